//! Images, friendly and hostile.
