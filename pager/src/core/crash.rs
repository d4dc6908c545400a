//! Named places at which a pager can be told to die, one at every state transition.
//!
//! `HOLO_CRASH_AT=name` kills the pager there once; the simulation dies at each in turn. What stands
//! before the place in program order has happened, what stands behind has not.

macro_rules! points {
    ($($(#[$doc:meta])* $id:ident = $name:literal),* $(,)?) => {
        /// A place at which a pager can be told to die.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum CrashPoint { $($(#[$doc])* $id),* }
        impl CrashPoint {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$id),*];
            /// The name for `HOLO_CRASH_AT`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$id => $name),* }
            }
        }
    };
}

points! {
    /// Messages are in the journal, none applied.
    EventsRead = "events-read",
    /// A message is applied, its slot not cleared.
    EventApplied = "event-applied",
    /// A move's new place holds nothing of before, and that is not written down.
    NewPlaceCleared = "new-place-cleared",
    /// An entry is at a move's new place and still at the old one.
    EntryMoving = "entry-moving",
    /// All entries of a move are at its new place; or its second message is known to be that.
    Moved = "moved",
    /// A slot is cleared.
    EventCleared = "event-cleared",
    /// A fork's child has a slot, its map is not copied.
    ForkBegun = "fork-begun",
    /// The child's map is copied, not yet active.
    ForkCopied = "fork-copied",
    /// A page is installed, the map still says stored.
    Installed = "installed",
    /// The map forgot an installed subpage's bytes, not yet released.
    InstalledForgotten = "installed-forgotten",
    /// A zero page is installed.
    Zeroed = "zeroed",
    /// A page under eviction is protected.
    Protected = "protected",
    /// Its bytes are in a frame, not in the map.
    PageRead = "page-read",
    /// The map says staged.
    Staged = "staged",
    /// The batch is written down, no request queued.
    BatchNoted = "batch-noted",
    /// A request is queued on the ring.
    FreeQueued = "free-queued",
    /// All requests are queued and the ring runs.
    FreeKicked = "free-kicked",
    /// A request's end was read.
    FreeDone = "free-done",
    /// The second read differed and is in the map.
    Restaged = "restaged",
    /// A page is unprotected.
    Unprotected = "unprotected",
    /// A page is in the store, the map still says staged.
    StorePut = "store-put",
    /// The map says stored.
    Stored = "stored",
    /// The kernel was asked to drop.
    PagedOut = "paged-out",
    /// A page was looked at.
    Looked = "looked",
    /// A region is registered, not yet known.
    Registered = "registered",
    /// A restored page's entries are forgotten.
    Restored = "restored",
    /// A range is unregistered.
    Unregistered = "unregistered",
}

impl CrashPoint {
    /// The point of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|p| p.name() == name)
    }
}
