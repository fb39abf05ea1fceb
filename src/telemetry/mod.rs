//! Tracing set-up: one line an event, to standard error, where journald or the console takes it.

use tracing_subscriber::filter::LevelFilter;

/// `error`, `warn`, `info` or `debug`; anything else counts as `info`.
pub fn start(level: &str) {
    let level = match level {
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "debug" => LevelFilter::DEBUG,
        _ => LevelFilter::INFO,
    };
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(is_terminal)
        .with_target(false)
        .with_writer(std::io::stderr)
        .finish();
    // Set by an earlier call, in tests.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
