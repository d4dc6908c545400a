//! The pager's own page buffers, counted. They live in memory that a successor keeps, because the map may
//! refer to them.

use super::map::FrameId;

/// Who holds which frame: an operation in progress, and each map entry that is staged in it.
#[derive(Debug)]
pub(crate) struct Frames {
    holds: Vec<u32>,
    free: Vec<FrameId>,
}

impl Frames {
    pub(crate) fn new(count: u16) -> Self {
        Self {
            holds: vec![0; usize::from(count)],
            free: (0..count).rev().map(FrameId).collect(),
        }
    }

    /// A free frame, held once.
    pub(crate) fn take(&mut self) -> Option<FrameId> {
        let frame = self.free.pop()?;
        self.holds[usize::from(frame.0)] = 1;
        Some(frame)
    }

    /// One more hold; also revives a free frame that a predecessor's map refers to.
    pub(crate) fn hold(&mut self, frame: FrameId) {
        let holds = &mut self.holds[usize::from(frame.0)];
        if *holds == 0 {
            self.free.retain(|&f| f != frame);
        }
        *holds += 1;
    }

    /// One hold less; the last one frees the frame.
    pub(crate) fn drop_hold(&mut self, frame: FrameId) {
        let holds = &mut self.holds[usize::from(frame.0)];
        assert!(*holds > 0, "a frame is given back once");
        *holds -= 1;
        if *holds == 0 {
            self.free.push(frame);
        }
    }

    pub(crate) fn holds(&self, frame: FrameId) -> u32 {
        self.holds[usize::from(frame.0)]
    }

    /// The frames that are held.
    pub(crate) fn held(&self) -> impl Iterator<Item = FrameId> + '_ {
        let all = (0..).map(FrameId).zip(&self.holds);
        all.filter(|&(_, &holds)| holds > 0).map(|(f, _)| f)
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }
}
