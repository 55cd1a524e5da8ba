// SPDX-License-Identifier: Apache-2.0
//! Random registers and random rings, from fixed seeds.
//!
//! Half of the steps are what a driver would do, so that the nonsense meets devices in every state, not only at the
//! front door. The fuzz target in `fuzz/` plays the same game with coverage as its guide, `examples/random-guests.rs` with
//! ever new seeds.
#![allow(clippy::unwrap_used)]

use cloister_devices::virtio::Empty;
use cloister_tests::driver::{Driver, Machine, register, wait_until};
use cloister_tests::game::{self, Player};
use cloister_tests::random::Random;
use cloister_tests::zoo;

/// Games per device, at least, and steps per game.
const GAMES: u64 = 40;
const STEPS: usize = 400;

#[test]
fn random_guests_harm_only_themselves() {
    for specimen in zoo::ALL {
        let machine = Machine::new();
        let mut served = 0;
        // How much a device gets done during a game depends on who else wants the processor: on a busy machine it takes more.
        for seed in 0..10 * GAMES {
            if seed >= GAMES && served > GAMES {
                break;
            }
            served += game::play(&machine, specimen, seed, STEPS);
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

/// A slot for a disk, before there is one.
#[test]
fn a_place_without_a_device_stays_empty() {
    let machine = Machine::new();
    for seed in 0..GAMES {
        let mut driver = Driver::new(&machine, Box::new(Empty));
        let mut player = Player::new(&mut driver);
        let moves = Random::new(seed).bytes(STEPS * game::BYTES_PER_STEP);
        player.play(&mut driver, &moves);
        assert!(!driver.transport.is_active(), "seed {seed}");
        driver.reset();
        assert_eq!(driver.status(), 0, "seed {seed}");
        assert!(!driver.health().is_failed(), "seed {seed}");
        assert_eq!(driver.read32(register::DEVICE_ID), 0);
        driver.write32(register::QUEUE_SEL, 0);
        assert_eq!(driver.read32(register::QUEUE_SIZE_MAX), 0);
    }
}
