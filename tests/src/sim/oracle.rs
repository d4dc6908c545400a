//! What every process may see: its memory as a machine without a pager would hold it.
//!
//! Each act of a program is applied here at the very step at which the simulated kernel performs it, and
//! whatever the pager does is not. So each subpage has exactly one legal content, but for three cases
//! in which the kernel's promise is weaker: after `MADV_FREE` it is the old content or zero until it is
//! written; while a `MADV_DONTNEED` runs it is the old one or zero; and a child that was forked while its
//! parent dropped a subpage may find either.

use std::collections::BTreeMap;

/// Content of a subpage, as far as programs write it.
pub(crate) type Content = [u32; 4];
/// What a fresh subpage holds.
pub(crate) const ZERO: Content = [0; 4];

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    content: Content,
    /// May turn to zero at any moment.
    lazy: bool,
}

/// The memory of one address space.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ideal {
    pages: BTreeMap<u64, Page>,
    /// Drops in progress: a name, first subpage, end.
    dropping: Vec<(u64, u64, u64)>,
}

impl Ideal {
    fn is_dropping(&self, v: u64) -> bool {
        self.dropping.iter().any(|&(_, s, e)| v >= s && v < e)
    }

    /// A program's thread or device sees `content` at `v`.
    pub(crate) fn see(&mut self, v: u64, content: Content) -> Result<(), String> {
        let dropping = self.is_dropping(v);
        let page = self.pages.entry(v).or_default();
        if page.content == content {
            return Ok(());
        }
        if content == ZERO && (page.lazy || dropping) {
            // It may be zero because it was dropped, or because the drop is still to come.
            page.content = ZERO;
            return Ok(());
        }
        Err(format!(
            "subpage {v:#x} holds {content:?}, legal is {:?}{}",
            page.content,
            if page.lazy || dropping {
                " or zero"
            } else {
                ""
            }
        ))
    }

    /// A word was written.
    pub(crate) fn write(&mut self, v: u64, word: usize, value: u32) {
        let page = self.pages.entry(v).or_default();
        page.content[word] = value;
        page.lazy = false;
    }

    /// A device wrote a word and marks no page dirty: what the process has offered may still go.
    pub(crate) fn write_unmarked(&mut self, v: u64, word: usize, value: u32) {
        self.pages.entry(v).or_default().content[word] = value;
    }

    /// A drop of `start..end` begins; `name` is unique.
    pub(crate) fn drop_begins(&mut self, name: u64, start: u64, end: u64) {
        self.dropping.push((name, start, end));
    }

    /// The drop has reached `to`, or ended.
    pub(crate) fn drop_reached(&mut self, name: u64, to: Option<u64>) {
        match to {
            Some(to) => {
                for d in self.dropping.iter_mut().filter(|d| d.0 == name) {
                    d.1 = to;
                }
            }
            None => self.dropping.retain(|d| d.0 != name),
        }
    }

    /// Whether a drop in progress may still touch `start..end`.
    pub(crate) fn drops_in(&self, start: u64, end: u64) -> bool {
        self.dropping.iter().any(|&(_, s, e)| s < end && e > start)
    }

    /// The content is zero now.
    pub(crate) fn zero(&mut self, v: u64) {
        self.pages.remove(&v);
    }

    /// The content may turn to zero at any moment until it is written.
    pub(crate) fn lazy(&mut self, start: u64, end: u64) {
        for v in start..end {
            self.pages.entry(v).or_default().lazy = true;
        }
    }

    /// Whatever was at `start..end` is gone.
    pub(crate) fn forget(&mut self, start: u64, end: u64) {
        self.pages.retain(|&v, _| v < start || v >= end);
    }

    /// The subpages `from..from+len` are at `to` now.
    pub(crate) fn moved(&mut self, from: u64, to: u64, len: u64) {
        let pages: Vec<_> = self
            .pages
            .range(from..from + len)
            .map(|(&v, &p)| (v, p))
            .collect();
        self.forget(from, from + len);
        self.forget(to, to + len);
        for (v, p) in pages {
            self.pages.insert(v - from + to, p);
        }
    }

    /// The memory of a fork's child, without what lies outside `kept`.
    pub(crate) fn forked(&self, kept: impl Fn(u64) -> bool) -> Self {
        let pages = self
            .pages
            .iter()
            .filter(|&(&v, _)| kept(v))
            .map(|(&v, p)| {
                let lazy = p.lazy || self.is_dropping(v);
                (v, Page { lazy, ..*p })
            })
            .collect();
        Self {
            pages,
            dropping: Vec::new(),
        }
    }

    /// Subpages that are not zero.
    pub(crate) fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }
}
