//! Images on this node: stored by digest, fetched from any source, loaded from archives, removed when unused.

pub mod decompress;
mod digest;
mod fetch;
mod load;
mod manifest;
mod store;
pub(crate) mod tree;
mod unpack;

pub use digest::{Digest, DigestError};
pub use fetch::{
    BlobKind, BlobRequest, BlobSource, FetchError, FetchRequest, KeepRequest, LAYER_UNPACKED_BYTES_MAX,
    LayerBlobs, Progress, SourceError, no_source,
};
pub use load::{LoadError, Loaded};
pub use manifest::{
    BlobRef, ConfigDocument, DOCUMENT_BYTES_MAX, Document, ImageConfig, Index, LAYER_BYTES_MAX, Manifest,
    ManifestError, Platform,
};
pub use store::{Collected, Hold, Image, ImageStore, StoreError};
pub use unpack::{UnpackError, unpack};
