//! The pager's arena: a memfd that a successor maps again.

use super::arena::{Arena, index};
use crate::sys::arena::SharedBytes;

impl Arena for SharedBytes {
    fn capacity(&self) -> u64 {
        SharedBytes::capacity(self) as u64
    }

    fn bytes(&self, offset: u64, len: usize) -> &[u8] {
        self.slice(index(offset), len)
    }

    fn bytes_mut(&mut self, offset: u64, len: usize) -> &mut [u8] {
        self.slice_mut(index(offset), len)
    }

    fn reserve(&mut self, offset: u64, len: u64) -> bool {
        SharedBytes::reserve(self, index(offset), index(len)).is_ok()
    }

    fn give_back(&mut self, offset: u64, len: u64) {
        let (offset, len) = (index(offset), index(len));
        if self.punch(offset, len).is_err() {
            // The memory is kept then, but nothing old may be found in it.
            self.slice_mut(offset, len).fill(0);
        }
    }
}
