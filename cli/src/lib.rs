//! What the two command lines share.
