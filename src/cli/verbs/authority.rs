//! `ca`: the certificate that visitors of `tinydc.http.tls=cluster` trust.

use argh::FromArgs;

use crate::api::wire::CaBody;
use crate::cli::Session;
use crate::cli::terminal::print_bytes;

/// Print the certificate of the cluster's own CA, for browsers and machines that are to trust its hosts.
#[derive(FromArgs)]
#[argh(subcommand, name = "ca", help_triggers("-h", "--help"))]
#[argh(example = "tinydc ca > home-ca.pem\ncurl --cacert home-ca.pem https://shop.example.org/")]
pub struct Ca {}

impl Ca {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let body: CaBody = session.client()?.read("/v1/ca").await?;
        session.show(&body, |body| print_bytes(body.certificate.as_bytes()))
    }
}
