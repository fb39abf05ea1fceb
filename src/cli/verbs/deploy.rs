//! `deploy`: makes a cluster run what a Compose file describes.
//!
//! File and what lies around it → `compose` (all problems at once) → content sent along → one request → `progress`
//! until it serves. Nothing is sent before the file is whole; Ctrl-C after that only stops the watching.

pub mod progress;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use argh::FromArgs;
use futures_lite::future;
use hyper::Method;
use nix::sys::signal::Signal;

use crate::api::wire::{ContentReply, DeployReply, DeployRequest, ProblemBody, StatusBody};
use crate::cli::client::{Client, DEPLOY_LIMIT, escape};
use crate::cli::failure::Failure;
use crate::cli::figures::{count, size};
use crate::cli::pack::{Packed, pack};
use crate::cli::project::find_file;
use crate::cli::terminal::{Signals, print_line};
use crate::cli::{Session, usage};
use crate::compose::{
    self, Draft, PathKind, Problem, SecretSource, SecretWish, Severity, Source, Surroundings,
};
use crate::model::{AppSpec, Gather, SecretName};

/// Run what a Compose file describes, or change what runs to it.
#[derive(FromArgs)]
#[argh(subcommand, name = "deploy", help_triggers("-h", "--help"))]
#[argh(example = "tinydc deploy\ntinydc deploy -f shop.yaml --name shop --dry-run")]
pub struct Deploy {
    /// the Compose file, - for standard input (default: compose.yaml here)
    #[argh(option, short = 'f', arg_name = "FILE")]
    file: Option<String>,
    /// what to call the app (default: name: in the file, or the directory)
    #[argh(option, arg_name = "APP")]
    name: Option<String>,
    /// say what would change, and change nothing
    #[argh(switch)]
    dry_run: bool,
    /// do not wait until it serves
    #[argh(switch, short = 'd')]
    detach: bool,
    /// how long to wait (default: 5m)
    #[argh(option, arg_name = "TIME")]
    timeout: Option<String>,
}

/// What is sent before the app.
struct Along {
    packed: Packed,
    secrets: Vec<(SecretName, Vec<u8>)>,
}

/// A Compose file that has been read.
struct Document {
    /// As problems name it.
    shown: String,
    text: String,
    folder: PathBuf,
}

impl Deploy {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let timeout = progress::timeout(self.timeout.as_deref())?;
        let document = Document::open(self.file.as_deref())?;
        let (draft, ignored) = read_draft(&document, self.name.as_deref())?;
        let packed = pack(&document.folder, &draft.content)?;
        for note in ignored.iter().chain(&packed.notes) {
            eprintln!("{note}");
        }
        let secrets = read_secrets(&document.folder, &draft.secrets)?;
        let spec = draft.finish(&packed.digests)?;
        let client = session.client()?;
        let app = spec.name.to_string();
        let is_sent = Cell::new(false);
        let signals = Signals::open(&[Signal::SIGINT])?;
        let along = Along { packed, secrets };
        let work = self.deploy(session, &client, spec, &along, timeout, &is_sent);
        future::or(work, async {
            signals.next().await?;
            match is_sent.get() {
                true => eprintln!("\nThe deploy goes on without you. See it: tinydc status {app}"),
                false => eprintln!("\nStopped before the app was changed."),
            }
            Err(Failure::command(130).into())
        })
        .await
    }

    async fn deploy(
        &self,
        session: &Session,
        client: &Client,
        spec: AppSpec,
        along: &Along,
        timeout: Duration,
        is_sent: &Cell<bool>,
    ) -> anyhow::Result<()> {
        if !self.dry_run {
            send_content(client, &along.packed).await?;
            for (name, bytes) in &along.secrets {
                let path = format!("/v1/secrets/{}", escape(name.as_str()));
                client.put_bytes(&path, bytes.clone().into()).await?;
            }
        }
        let app = spec.name.to_string();
        let request = DeployRequest { spec, is_dry_run: self.dry_run };
        let path = format!("/v1/apps/{}", escape(&app));
        is_sent.set(!self.dry_run);
        let reply: DeployReply = client.write(Method::POST, &path, &request, DEPLOY_LIMIT).await?;
        if self.dry_run {
            return session.show(&reply, |reply| print_changes(&request.spec, reply, true));
        }
        if self.detach {
            return session.show(&reply, |reply| {
                print_changes(&request.spec, reply, false);
                print_line(&format!("See it: tinydc status {app}"));
            });
        }
        if !session.is_json() {
            print_changes(&request.spec, &reply, false);
        }
        let status: StatusBody = progress::wait(session, client, &app, timeout).await?;
        session.show(&status, progress::print_end)
    }
}

impl Document {
    fn open(file: Option<&str>) -> anyhow::Result<Document> {
        let here = std::env::current_dir().context("find the current directory")?;
        let (shown, bytes, folder) = match file {
            Some("-") => {
                let text = io::read_to_string(io::stdin()).context("read standard input")?;
                ("(standard input)".into(), text.into_bytes(), here)
            }
            given => {
                let path = given.map(PathBuf::from).or_else(|| find_file(&here)).ok_or_else(|| {
                    usage(
                        "there is no compose.yaml here",
                        "go to the app's directory, or: tinydc deploy -f FILE",
                    )
                })?;
                let bytes = read_bounded(&path)?;
                let whole = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
                let folder = whole.parent().map_or(here, Path::to_path_buf);
                let shown =
                    path.strip_prefix(&std::env::current_dir()?).unwrap_or(&path).display().to_string();
                (shown, bytes, folder)
            }
        };
        let text = compose::read_text(&shown, &bytes).map_err(|problem| invalid(&[problem]))?.to_owned();
        Ok(Document { shown, text, folder })
    }
}

fn read_bounded(path: &Path) -> anyhow::Result<Vec<u8>> {
    let shown = path.display();
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(usage(format!("there is no file {shown}"), "tinydc deploy -f FILE"));
        }
        metadata => metadata.with_context(|| format!("read {shown}"))?,
    };
    if metadata.len() > compose::FILE_BYTES_MAX as u64 {
        let limit = size(compose::FILE_BYTES_MAX as u64);
        return Err(usage(format!("{shown} is larger than {limit}"), "is it a Compose file?"));
    }
    fs::read(path).with_context(|| format!("read {shown}"))
}

/// The app, and what of the file has no effect.
fn read_draft(document: &Document, name: Option<&str>) -> anyhow::Result<(Draft, Vec<String>)> {
    let folder = &document.folder;
    let environment = environment(folder)?;
    let directory_name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let surroundings = Surroundings {
        environment: &environment,
        env_files: &|path| fs::read_to_string(folder.join(path)).map_err(|error| error.to_string()),
        look: &|path| look(&folder.join(path)),
        name,
        directory_name: directory_name.as_deref().unwrap_or("app"),
    };
    let source = Source { file: &document.shown, text: &document.text };
    let outcome = compose::read(&source, &surroundings);
    match outcome.app {
        Some(draft) => Ok((draft, outcome.problems.iter().map(Problem::to_string).collect())),
        None => Err(invalid(&outcome.problems).into()),
    }
}

/// Bad input is usage: exit 2.
fn invalid(problems: &[Problem]) -> Failure {
    let errors: Vec<&Problem> =
        problems.iter().filter(|problem| problem.severity == Severity::Error).collect();
    let file = problems.first().map_or("the file", |problem| &problem.file);
    let failure =
        Failure::usage(format!("{file} has {}; nothing was deployed", count(errors.len(), "error")));
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let bodies = errors.iter().map(|problem| {
        let hint = problem.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        ProblemBody {
            file: problem.file.clone(),
            line: number(problem.line),
            column: number(problem.column),
            message: format!("{}{hint}", problem.message),
        }
    });
    failure.problems(bodies.collect())
}

/// `.env` beside the file, and over it this process's variables.
fn environment(folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let process: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .gather();
    let path = folder.join(".env");
    let mut environment = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
        text => {
            let text = text.with_context(|| format!("read {}", path.display()))?;
            compose::parse_dotenv(&text, &process)
                .map_err(|error| usage(format!(".env: {error}"), "correct that line"))?
        }
    };
    environment.extend(process.into_iter().map(|(name, value)| (name, Some(value))));
    Ok(environment.into_iter().filter_map(|(name, value)| Some((name, value?))).gather())
}

fn look(path: &Path) -> PathKind {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => PathKind::Missing,
        Err(error) => PathKind::Other(format!("unreadable ({error})")),
        Ok(metadata) if metadata.is_file() => PathKind::File,
        Ok(metadata) if metadata.is_dir() => PathKind::Directory,
        Ok(_) => PathKind::Other("a socket, pipe or device".into()),
    }
}

fn read_secrets(folder: &Path, wishes: &[SecretWish]) -> anyhow::Result<Vec<(SecretName, Vec<u8>)>> {
    let read = |wish: &SecretWish| {
        let bytes = match &wish.source {
            SecretSource::Text(text) => text.0.clone().into_bytes(),
            SecretSource::File(path) => {
                super::secret::read(wish.name.as_str(), &folder.join(path).display().to_string())?
            }
        };
        Ok((wish.name.clone(), bytes))
    };
    wishes.iter().map(read).collect()
}

async fn send_content(client: &Client, packed: &Packed) -> anyhow::Result<()> {
    for (digest, archive) in &packed.archives {
        let reply: ContentReply = client.put_content("/v1/content", archive.clone().into()).await?;
        if reply.digest != *digest {
            return Err(
                Failure::refused(format!("the files arrived as {}, not {digest}", reply.digest)).into()
            );
        }
    }
    Ok(())
}

fn print_changes(spec: &AppSpec, reply: &DeployReply, is_dry_run: bool) {
    let app = &reply.app;
    if reply.changed.is_empty() && reply.removed.is_empty() {
        return print_line(&match is_dry_run {
            true => format!("{app}: nothing would change."),
            false => format!("{app}: nothing changed."),
        });
    }
    let (change, remove) =
        if is_dry_run { ("would change", "would be removed") } else { ("changes", "is removed") };
    for service in &reply.changed {
        let image = spec.services.get(service).map(|service| service.image.reference.as_str());
        print_line(&format!("{app}/{service} {change} ({})", image.unwrap_or("?")));
    }
    for service in &reply.removed {
        print_line(&format!("{app}/{service} {remove}; its volumes are kept"));
    }
    if is_dry_run {
        print_line("Nothing was changed: this was a dry run.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::contexts::tests::Folder;

    #[test]
    fn a_file_with_mistakes_names_all_of_them_and_is_a_usage_error() {
        let folder = Folder::create();
        let text = "services:\n  web:\n    imag: nginx\n    ports: [\"99999:80\"]\n".to_owned();
        let document = Document { shown: "compose.yaml".into(), text, folder: folder.0.clone() };
        let error = read_draft(&document, Some("shop")).unwrap_err();
        let failure = error.downcast_ref::<Failure>().unwrap();
        assert_eq!(failure.exit.number(), 2);
        let lines: Vec<u32> = failure.detail.problems.iter().map(|problem| problem.line).collect();
        assert!(lines.contains(&3) && lines.contains(&4), "{:?}", failure.detail.problems);
    }

    #[test]
    fn the_file_beside_it_gives_variables_and_content() {
        let folder = Folder::create();
        fs::write(folder.0.join(".env"), "TAG=1.27\n").unwrap();
        fs::write(folder.0.join("nginx.conf"), "events {}\n").unwrap();
        let text = "services:\n  web:\n    image: nginx:${TAG}\n    volumes: [\"./nginx.conf:/etc/nginx.conf:ro\"]\n";
        let document = Document { shown: "compose.yaml".into(), text: text.into(), folder: folder.0.clone() };
        let (draft, ignored) = read_draft(&document, Some("shop")).unwrap();
        assert!(ignored.is_empty(), "{ignored:?}");
        let packed = pack(&folder.0, &draft.content).unwrap();
        let spec = draft.finish(&packed.digests).unwrap();
        assert_eq!(spec.services["web"].image.reference, "nginx:1.27");
        assert_eq!(spec.services["web"].content_digests().len(), 1);
    }
}
