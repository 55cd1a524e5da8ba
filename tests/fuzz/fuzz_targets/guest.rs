// SPDX-License-Identifier: Apache-2.0
//! A guest that does what the fuzzer tells it, on the registers and queues of a device that the first byte chooses.
#![no_main]

use std::cell::OnceCell;

use cloister_tests::driver::{Driver, Machine};
use cloister_tests::game::Player;
use cloister_tests::zoo::{self, Animal};
use libfuzzer_sys::fuzz_target;

thread_local! {
    // One event loop for all inputs: starting a thread for each would cost more than the rest.
    static MACHINE: OnceCell<Machine> = const { OnceCell::new() };
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, moves)) = data.split_first() else {
        return;
    };
    let specimen = &zoo::ALL[usize::from(choice) % zoo::ALL.len()];
    MACHINE.with(|machine| {
        let machine = machine.get_or_init(Machine::new);
        let Animal { device, keep } = (specimen.make)(machine);
        let mut driver = Driver::new(machine, device);
        Player::new(&mut driver).play(&mut driver, moves);
        // Panics if a handler panicked.
        drop(driver);
        drop(keep);
    });
});
