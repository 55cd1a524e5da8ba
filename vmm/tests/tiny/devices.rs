// SPDX-License-Identifier: Apache-2.0
//! A virtio device of one queue that behaves as a test wants.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cloister_devices::state::{SavedState, StateError};
use cloister_devices::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ActiveQueue, DeviceType, Interrupt, RestoreError,
    VirtioDevice,
};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// What the device does when its queue is notified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Interrupts the driver.
    Interrupt,
    /// Panics.
    Panic,
    /// Does not return before it is released.
    Stuck,
    /// Does not return from its activation, on the vCPU's thread, before it is released.
    StuckAtActivation,
}

/// What the test sees of it.
#[derive(Default)]
pub struct Seen {
    notifications: AtomicUsize,
    activations: AtomicUsize,
    released: AtomicBool,
}

impl Seen {
    pub fn notifications(&self) -> usize {
        self.notifications.load(Ordering::SeqCst)
    }
    pub fn activations(&self) -> usize {
        self.activations.load(Ordering::SeqCst)
    }
    pub fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
    }
    fn wait(&self) {
        while !self.released.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub struct TestDevice {
    behaviour: Behaviour,
    seen: Arc<Seen>,
}

impl TestDevice {
    pub fn boxed(behaviour: Behaviour) -> (Box<dyn VirtioDevice>, Arc<Seen>) {
        let seen = Arc::<Seen>::default();
        (
            Box::new(Self {
                behaviour,
                seen: Arc::clone(&seen),
            }),
            seen,
        )
    }
}

struct Handler {
    behaviour: Behaviour,
    seen: Arc<Seen>,
    queue: ActiveQueue,
    interrupt: Arc<Interrupt>,
}

impl VirtioDevice for TestDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _: u32, _: &mut [u8]) {}
    fn activate(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.seen.activations.fetch_add(1, Ordering::SeqCst);
        if self.behaviour == Behaviour::StuckAtActivation {
            self.seen.wait();
        }
        Ok(Arc::new(Mutex::new(Handler {
            behaviour: self.behaviour,
            seen: Arc::clone(&self.seen),
            queue: context.take_queue(0)?,
            interrupt: context.interrupt,
        })))
    }
    fn reset(&mut self) {}
    fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode("test", 1, &())
    }
    fn restore(&mut self, _: &SavedState) -> Result<(), StateError> {
        Ok(())
    }
    fn restore_active(
        &mut self,
        context: ActivationContext,
        _: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        Ok(self.activate(context)?)
    }
}

impl MutEventSubscriber for Handler {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(self.queue.notification(), EventSet::IN))
            .unwrap();
    }
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue.clear_notification();
        self.seen.notifications.fetch_add(1, Ordering::SeqCst);
        match self.behaviour {
            Behaviour::Interrupt | Behaviour::StuckAtActivation => self.interrupt.signal_used(),
            Behaviour::Panic => panic!("expected by the test"),
            Behaviour::Stuck => self.seen.wait(),
        }
    }
}

impl ActiveDevice for Handler {
    fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode("test", 1, &())
    }
    fn queues(&self) -> Vec<Option<virtio_queue::QueueState>> {
        vec![Some(self.queue.state())]
    }
}
