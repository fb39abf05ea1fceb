//! `settings`: what holds for the whole cluster.

use argh::FromArgs;
use hyper::Method;
use serde_json::Value;

use crate::api::wire::{SettingValue, SettingsBody};
use crate::cli::client::{WRITE_LIMIT, escape};
use crate::cli::failure::Failure;
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::{Colour, print_line};
use crate::cli::{Session, usage};

/// Show the cluster's settings, one of them, or change it.
#[derive(FromArgs)]
#[argh(subcommand, name = "settings", help_triggers("-h", "--help"))]
#[argh(example = "tinydc settings\ntinydc settings timers fast")]
pub struct Settings {
    /// a setting, and its new value
    #[argh(positional, arg_name = "KEY [VALUE]")]
    words: Vec<String>,
}

impl Settings {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let (key, value) = match &self.words[..] {
            [] => (None, None),
            [key] => (Some(key), None),
            [key, value] => (Some(key), Some(value)),
            _ => return Err(usage("a setting has one value", "write a list with commas: a,b")),
        };
        let client = session.client()?;
        if let (Some(key), Some(value)) = (key, value) {
            let path = format!("/v1/settings/{}", escape(key));
            let body = SettingValue { value: value.clone() };
            let _: Value = client.write(Method::PUT, &path, &body, WRITE_LIMIT).await?;
            session.done(&format!("{key} is {value}."));
            return Ok(());
        }
        let body: SettingsBody = client.read("/v1/settings").await?;
        let Some(key) = key else { return session.show(&body, print) };
        let found = body.settings.iter().find(|setting| setting.key == *key);
        let setting = found.ok_or_else(|| {
            Failure::refused(format!("there is no setting {key}")).hint("tinydc settings lists them")
        })?;
        // The value alone, for scripts.
        session.show(setting, |setting| print_line(&setting.value))
    }
}

fn print(body: &SettingsBody) {
    let mut table = Table::new(&["KEY", "VALUE", "DEFAULT", "MEANING"]).wrapping_last();
    for setting in &body.settings {
        let value = match setting.value == setting.default {
            true => Cell::from(&setting.value),
            false => Cell::coloured(&setting.value, Colour::Yellow),
        };
        table.row([(&setting.key).into(), value, (&setting.default).into(), (&setting.meaning).into()]);
    }
    table.print();
}
