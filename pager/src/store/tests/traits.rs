//! The trait's side of the embedded store.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::content::{Content, page_of};
use super::model::empty_frame;
use crate::store::api::{Completion, Location, PageStore, StoreError, Ticket};
use crate::store::{COMPLETIONS_MAX, EmbeddedStore, HeapArena};

fn store() -> EmbeddedStore<HeapArena> {
    EmbeddedStore::create(HeapArena::new(3 << 20), 2 << 20)
}

#[test]
fn completions_come_in_order_with_their_tickets() {
    let mut store = store();
    let page = page_of(&[Content::Zero, Content::Text(1)]);
    store.put(Ticket(7), &page, SubpageMask::ALL);
    let Some(Completion::Put { ticket, result }) = store.poll() else {
        panic!("a put completes at once");
    };
    let locations = result.unwrap();
    assert_eq!(ticket, Ticket(7));
    assert_eq!((locations[0], locations[1].is_some()), (None, true));

    let mut frame = empty_frame();
    store.get(Ticket(8), &locations, &mut frame);
    assert_eq!(frame, page);
    let nowhere = [Some(Location(1)); PAGE_SUBPAGES];
    store.get(Ticket(9), &nowhere, &mut frame);
    let result = Ok(());
    let ticket = Ticket(8);
    assert_eq!(store.poll(), Some(Completion::Get { ticket, result }));
    let result = Err(StoreError::NoSuchLocation);
    let ticket = Ticket(9);
    assert_eq!(store.poll(), Some(Completion::Get { ticket, result }));
    assert_eq!(store.poll(), None);
}

#[test]
#[should_panic(expected = "polls before")]
fn a_caller_that_never_polls_is_stopped() {
    let mut store = store();
    for n in 0..=COMPLETIONS_MAX as u64 {
        store.put(Ticket(n), &page_of(&[]), SubpageMask::ALL);
    }
}
