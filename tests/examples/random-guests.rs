// SPDX-License-Identifier: Apache-2.0
//! Random guests for as long as one likes: what `tests/hostile_random.rs` plays, with ever new seeds.
//!
//! `random-guests [SECONDS [SEED]]` plays with each kind of device in turn. It says the seed of a game that ends badly
//! or does not end; `random-guests 0 SEED` plays that one again, with all kinds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use cloister_tests::driver::Machine;
use cloister_tests::{game, zoo};

const STEPS: usize = 1000;
/// A game takes milliseconds.
const HANGS: Duration = Duration::from_secs(60);

static SEED: AtomicU64 = AtomicU64::new(0);
static GAMES: AtomicU64 = AtomicU64::new(0);

/// Ends the program when no game has ended for long.
fn watch() {
    let mut seen = 0;
    loop {
        std::thread::sleep(HANGS);
        let games = GAMES.load(Ordering::SeqCst);
        if games == seen {
            eprintln!("the game with seed {} does not end", SEED.load(Ordering::SeqCst));
            std::process::abort();
        }
        seen = games;
    }
}

fn main() {
    let mut args = std::env::args()
        .skip(1)
        .map(|arg| arg.parse::<u64>().expect("a number"));
    let length = Duration::from_secs(args.next().unwrap_or(60));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let first = args.next().unwrap_or(now.as_secs() << 20);
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("seed {}: {panic}", SEED.load(Ordering::SeqCst));
        std::process::abort();
    }));
    std::thread::spawn(watch);
    let start = Instant::now();
    let mut served = vec![0; zoo::ALL.len()];
    for seed in first.. {
        SEED.store(seed, Ordering::SeqCst);
        for (specimen, served) in zoo::ALL.iter().zip(&mut served) {
            let machine = Machine::new();
            *served += game::play(&machine, specimen, seed, STEPS);
            GAMES.fetch_add(1, Ordering::SeqCst);
        }
        if start.elapsed() >= length {
            break;
        }
    }
    println!(
        "{} games of {STEPS} steps from seed {first} on",
        GAMES.load(Ordering::SeqCst)
    );
    for (specimen, served) in zoo::ALL.iter().zip(served) {
        println!("{}: {served} chains came back", specimen.name);
    }
}
