// SPDX-License-Identifier: Apache-2.0
//! Cells made ahead: clones of a template that have given their agent's first answer and stand still until a pod takes one.
//!
//! ```text
//!  (nothing) ──make()──▶ cloned, asked, paused ──take──▶ cards connected, resumed, configured: a pod's
//!                             │
//!                             └── template gone, kind not used any more, end of the process ──▶ discarded
//! ```
//!
//! What a clone does for the first time it does slowly: each page that it touches is an exit, its agent dials the host,
//! its connections are reset. All that is behind a cell that was made ahead, and so is the making of the VM. It has been given
//! randomness and the time, and is given both again with its pod's identity, for it may have stood still for days. It uses no
//! processor; its memory is what it has written since it was cloned, 1 to 2 MiB.

use super::machine::Origin;
use super::template::Kind;
use super::vm::{self, PodVm, QUICK};
use cloister_protocol::pod::ConfigureRequest;
use cloister_vmm::CellHost;
use cloister_vmm::image::Image;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What is made ahead for the pods of a kind.
#[derive(Clone, Debug, Default)]
pub struct Ahead {
    /// Cells.
    pub count: usize,
    /// What each is told in advance: what is the same for all pods of the kind.
    pub configuration: ConfigureRequest,
}

/// Cells of one kind. `T` is a cell.
#[derive(Debug)]
pub(super) struct Stock<T> {
    ready: Vec<T>,
    count: usize,
    filling: bool,
}

impl<T> Default for Stock<T> {
    fn default() -> Self {
        Self {
            ready: Vec::new(),
            count: 0,
            filling: false,
        }
    }
}

impl<T> Stock<T> {
    /// There are to be so many. Answers whether the caller is to fill it: it is short of some, and nobody else does.
    pub fn keep(&mut self, count: usize) -> bool {
        self.count = count;
        let fill = !self.filling && self.ready.len() < count;
        self.filling |= fill;
        fill
    }

    /// Whether who fills it is to make one more; if not, it is not being filled any more.
    pub fn wants_more(&mut self) -> bool {
        self.filling = self.ready.len() < self.count;
        self.filling
    }

    /// Who fills it cannot go on.
    pub fn stop_filling(&mut self) {
        self.filling = false;
    }

    /// Takes one in; answers it if there are enough.
    pub fn add(&mut self, one: T) -> Option<T> {
        if self.ready.len() >= self.count {
            return Some(one);
        }
        self.ready.push(one);
        None
    }

    /// Gives one out: the one that was made first.
    pub fn take(&mut self) -> Option<T> {
        (!self.ready.is_empty()).then(|| self.ready.remove(0))
    }

    /// Gives all out, and wants no more.
    pub fn give_up(&mut self) -> Vec<T> {
        self.count = 0;
        std::mem::take(&mut self.ready)
    }
}

/// Numbers cells: their threads' names are made of it, which are short.
static NUMBER: AtomicU32 = AtomicU32::new(1);

/// Makes a cell. To be called in a runtime, at a quiet moment.
pub(super) async fn make(
    kind: &Kind,
    image: Arc<Image>,
    cells: &CellHost,
    configuration: &ConfigureRequest,
) -> Result<PodVm, vm::Error> {
    let name = format!("p-{:06x}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let mut vm = PodVm::start(kind.config(name, Origin::Clone(image)), cells).await?;
    let prepared = async {
        vm.ready(QUICK).await?;
        vm.configure(configuration).await?;
        let machine = Arc::clone(&vm.machine);
        let paused = tokio::task::spawn_blocking(move || machine.pause()).await;
        paused.map_err(|e| vm::io_error("pause a cell")(std::io::Error::other(e)))??;
        Ok(())
    };
    match prepared.await {
        Ok(()) => Ok(vm),
        Err(error) => {
            vm.discard().await;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_is_filled_by_one_up_to_its_number() {
        let mut stock = Stock::default();
        assert!(!stock.keep(0));
        assert!(stock.keep(2));
        assert!(!stock.keep(2), "somebody fills it");
        assert!(stock.wants_more());
        assert_eq!(stock.add(1), None);
        assert!(stock.wants_more());
        assert_eq!(stock.add(2), None);
        assert!(!stock.wants_more());
        assert_eq!(stock.add(3), Some(3));
        assert_eq!(stock.take(), Some(1));
        assert!(stock.keep(2));
        stock.stop_filling();
        assert!(stock.keep(2), "who filled it has failed");
    }

    #[test]
    fn what_is_given_up_is_not_filled_again() {
        let mut stock = Stock::default();
        assert!(stock.keep(2));
        assert_eq!(stock.add(1), None);
        assert_eq!(stock.give_up(), [1]);
        assert!(!stock.wants_more());
        assert_eq!(stock.add(2), Some(2));
        assert_eq!(stock.take(), None);
        assert!(stock.keep(1), "it is used again");
    }
}
