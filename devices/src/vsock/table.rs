// SPDX-License-Identifier: Apache-2.0
//! The connections of one device.
//!
//! A [`Token`] stays valid exactly as long as its connection: slots are used again under another generation, so that
//! an epoll event or a list entry that is older than its slot's connection finds nothing.

use std::collections::HashMap;

use super::connection::{Connection, Key};

/// Names a connection: slot number and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Token {
    pub slot: u32,
    pub generation: u32,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    connection: Option<Box<Connection>>,
}

#[derive(Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_key: HashMap<Key, Token>,
}

impl Table {
    /// Connections, with those that linger without their guest's side.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts a connection in; `None` if there is one with its key. The caller limits their number.
    pub fn insert(&mut self, connection: Connection) -> Option<Token> {
        if self.by_key.contains_key(&connection.key) {
            return None;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                slot
            }
        };
        let entry = self.slots.get_mut(usize::try_from(slot).ok()?)?;
        let token = Token {
            slot,
            generation: entry.generation,
        };
        self.by_key.insert(connection.key, token);
        entry.connection = Some(Box::new(connection));
        Some(token)
    }

    pub fn find(&self, key: Key) -> Option<Token> {
        self.by_key.get(&key).copied()
    }

    pub fn get_mut(&mut self, token: Token) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(usize::try_from(token.slot).ok()?)?;
        if slot.generation != token.generation {
            return None;
        }
        slot.connection.as_deref_mut()
    }

    /// Makes the key free for a new connection while this one goes on without it.
    pub fn release_key(&mut self, token: Token) {
        let Some(key) = self.get_mut(token).map(|connection| connection.key) else {
            return;
        };
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    pub fn remove(&mut self, token: Token) -> Option<Box<Connection>> {
        self.release_key(token);
        let slot = self.slots.get_mut(usize::try_from(token.slot).ok()?)?;
        if slot.generation != token.generation {
            return None;
        }
        let connection = slot.connection.take()?;
        slot.generation = slot.generation.wrapping_add(1) & Self::GENERATIONS;
        self.free.push(token.slot);
        Some(connection)
    }

    /// Generations fit into 31 bits, which leaves a bit of epoll's data to tell connections from the rest.
    const GENERATIONS: u32 = u32::MAX >> 1;
}

#[cfg(test)]
mod tests {
    use super::super::connection::State;
    use super::*;
    use std::os::unix::net::UnixStream;

    fn connection(guest_port: u32) -> Connection {
        let key = Key {
            host_port: 1,
            guest_port,
        };
        Connection::new(key, UnixStream::pair().unwrap().0, State::Established, 4096)
    }

    #[test]
    fn a_token_outlives_nothing() {
        let mut table = Table::default();
        let first = table.insert(connection(7)).unwrap();
        assert!(table.insert(connection(7)).is_none(), "one connection per key");
        assert!(table.get_mut(first).is_some());
        assert!(table.remove(first).is_some());
        assert!(table.remove(first).is_none());
        let second = table.insert(connection(7)).unwrap();
        assert_eq!(second.slot, first.slot);
        assert!(table.get_mut(first).is_none());
        // A lingering connection does not stand in the way of a new one, nor takes its key along when it goes.
        table.release_key(second);
        let third = table.insert(connection(7)).unwrap();
        assert_eq!(table.len(), 2);
        assert!(table.remove(second).is_some());
        let key = Key {
            host_port: 1,
            guest_port: 7,
        };
        assert_eq!(table.find(key), Some(third));
        assert_eq!(table.len(), 1);
    }
}
