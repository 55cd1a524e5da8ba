// SPDX-License-Identifier: Apache-2.0
//! Random registers and random rings, from fixed seeds.
//!
//! Half of the steps are what a driver would do, so that the nonsense meets devices in every state, not only at the
//! front door. The fuzz target in `fuzz/` plays the same game with coverage as its guide.
#![allow(clippy::unwrap_used)]

use cloister_tests::driver::{Driver, Machine, register, wait_until};
use cloister_tests::game::{self, Player};
use cloister_tests::random::Random;
use cloister_tests::zoo::{self, Animal};

/// Games per device, and steps per game.
const GAMES: u64 = 40;
const STEPS: usize = 400;

#[test]
fn random_guests_harm_only_themselves() {
    for specimen in zoo::ALL {
        let machine = Machine::new();
        let mut served = 0;
        for seed in 0..GAMES {
            let Animal { device, keep } = (specimen.make)(&machine);
            let mut driver = Driver::new(&machine, device);
            let mut player = Player::new(&mut driver);
            let mut random = Random::new(seed);
            let moves: Vec<u8> = random.bytes(STEPS * game::BYTES_PER_STEP);
            player.play(&mut driver, &moves);
            served += player.served();
            // Whatever happened: after a reset there is a device, and the event loop still turns.
            driver.reset();
            assert_eq!(driver.status(), 0, "{} seed {seed}", specimen.name);
            assert_ne!(driver.read32(register::DEVICE_ID), 0);
            assert!(!driver.health().is_failed());
            // Fails if a handler panicked.
            drop(driver);
            drop(keep);
        }
        assert!(
            served > GAMES,
            "{}: the games hardly reach the device",
            specimen.name
        );
        assert!(
            wait_until(|| machine.event_loop.busy().is_none()),
            "{}: a handler did not come back",
            specimen.name
        );
    }
}
