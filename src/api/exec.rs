//! A command in a running container, over an upgraded connection. Frames as `wire::ExecBody` describes them.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::instances;
use super::peer;
use super::wire::ExecBody;
use crate::agent::container_id;
use crate::runtime::{ExecHandle, ExecRequest, ExecStreams};
use crate::tasks::Launch;
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{Request, Response, StatusCode};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const WINDOW: u8 = 2;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
const ERROR: u8 = 4;
const FRAME_BYTES_MAX: usize = 64 << 10;

pub async fn exec(
    backend: &Arc<Backend>,
    name: &str,
    mut request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let state = backend.replica.state();
    let instance = instances::find(&state, name)?;
    let Some(node) = instance.node else {
        return Err(ApiError::rejected(format!("{name} does not run")).hint("tinydc ps shows why"));
    };
    if node != backend.node {
        return peer::proxy(&backend.transport, &backend.executor, node, request).await;
    }
    let wants_upgrade = request.headers().get("upgrade").is_some_and(|value| value == "tinydc-exec");
    if !wants_upgrade {
        return Err(ApiError::invalid("exec needs the header Upgrade: tinydc-exec"));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let wish: ExecBody = body::parse(request.into_body()).await?;
    if wish.command.is_empty() {
        return Err(ApiError::invalid("exec needs a command"));
    }
    let runtime = backend.ground.runtime.clone();
    let container = container_id(instance.id);
    let exec_request = ExecRequest {
        command: wish.command.clone(),
        env: wish.environment.into_iter().collect(),
        user: wish.user,
        working_dir: wish.working_dir,
    };
    let pipes = Pipes::make(wish.has_terminal).map_err(|error| ApiError::internal(&error))?;
    let streams = match pipes.child {
        Some((stdin, stdout, stderr)) => ExecStreams::Given {
            stdin: if wish.has_stdin { Stdio::from(stdin) } else { Stdio::null() },
            stdout: Stdio::from(stdout),
            stderr: Stdio::from(stderr),
        },
        None => ExecStreams::Terminal { rows: wish.rows.max(1), columns: wish.columns.max(1) },
    };
    let handle = crate::tasks::unblock(move || runtime.exec(&container, &exec_request, streams)).await;
    let handle = handle.map_err(|error| ApiError::rejected(crate::agent::chain(&error)))?;
    let own = pipes.own;
    backend
        .executor
        .launch(async move {
            if let Ok(upgraded) = upgrade.await {
                converse(crate::upgraded::Stream(upgraded), handle, own).await;
            }
        })
        .detach();
    let mut reply = Response::new(body::full(""));
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    reply.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
    reply.headers_mut().insert("upgrade", HeaderValue::from_static("tinydc-exec"));
    Ok(reply)
}

/// The daemon's ends of the command's streams, when it has no terminal.
struct Own {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

struct Pipes {
    child: Option<(OwnedFd, OwnedFd, OwnedFd)>,
    own: Option<Own>,
}

impl Pipes {
    fn make(has_terminal: bool) -> io::Result<Pipes> {
        if has_terminal {
            return Ok(Pipes { child: None, own: None });
        }
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from);
        let (in_reader, in_writer) = pipe()?;
        let (out_reader, out_writer) = pipe()?;
        let (err_reader, err_writer) = pipe()?;
        Ok(Pipes {
            child: Some((in_reader, out_writer, err_writer)),
            own: Some(Own { stdin: in_writer, stdout: out_reader, stderr: err_reader }),
        })
    }
}

/// Carries frames until the command has ended or the client has gone, which ends the command.
async fn converse<S>(stream: S, mut handle: ExecHandle, own: Option<Own>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (reader, mut writer) = futures_lite::io::split(stream);
    let (frames, outgoing) = async_channel::bounded::<(u8, Vec<u8>)>(16);
    let terminal = handle.terminal.as_ref().and_then(|fd| fd.as_fd().try_clone_to_owned().ok());
    let window = terminal.as_ref().and_then(|fd| fd.try_clone().ok());
    let input = match (&terminal, own.as_ref()) {
        (Some(terminal), _) => terminal.try_clone().ok(),
        (None, Some(own)) => own.stdin.try_clone().ok(),
        (None, None) => None,
    };
    let outputs = match (terminal, own) {
        (Some(terminal), _) => vec![(STDOUT, terminal)],
        (None, Some(own)) => vec![(STDOUT, own.stdout), (STDERR, own.stderr)],
        (None, None) => Vec::new(),
    };
    let send = async {
        while let Ok((kind, bytes)) = outgoing.recv().await {
            if write_frame(&mut writer, kind, &bytes).await.is_err() {
                return;
            }
        }
    };
    let receive = read_frames(reader, input, window);
    let run = async {
        let pumps: Vec<_> = outputs.into_iter().map(|(kind, fd)| pump(kind, fd, frames.clone())).collect();
        let exit = handle.finished().await;
        for pump in pumps {
            pump.await;
        }
        let last = match exit {
            Ok(code) => (EXIT, code.to_be_bytes().to_vec()),
            Err(error) => (ERROR, crate::agent::chain(&error).into_bytes()),
        };
        let _ = frames.send(last).await;
        frames.close();
    };
    // The client's end of the stream ends the command: dropping the handle kills it.
    let work = futures_lite::future::or(
        async {
            run.await;
            true
        },
        async {
            receive.await;
            false
        },
    );
    futures_lite::future::zip(send, async {
        if !work.await {
            outgoing.close();
        }
    })
    .await;
    let _ = writer.close().await;
}

/// Reads one of the command's outputs on a blocking thread until it ends.
fn pump(kind: u8, fd: OwnedFd, frames: async_channel::Sender<(u8, Vec<u8>)>) -> smol::Task<()> {
    smol::unblock(move || {
        use std::io::Read;
        let mut file = File::from(fd);
        let mut buffer = vec![0; 16 << 10];
        loop {
            match file.read(&mut buffer) {
                // A terminal whose last user has gone answers with EIO.
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if frames.send_blocking((kind, buffer[..count].to_vec())).is_err() {
                        return;
                    }
                }
            }
        }
    })
}

async fn write_frame(writer: &mut (impl AsyncWrite + Unpin), kind: u8, bytes: &[u8]) -> io::Result<()> {
    let mut head = [kind, 0, 0, 0, 0];
    head[1..].copy_from_slice(&(bytes.len() as u32).to_be_bytes());
    writer.write_all(&head).await?;
    writer.write_all(bytes).await?;
    writer.flush().await
}

/// Returns when the client has closed the connection or sent what is no frame.
async fn read_frames(
    mut reader: impl AsyncRead + Unpin,
    mut input: Option<OwnedFd>,
    window: Option<OwnedFd>,
) {
    loop {
        let mut head = [0; 5];
        if reader.read_exact(&mut head).await.is_err() {
            return;
        }
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > FRAME_BYTES_MAX {
            return;
        }
        let mut bytes = vec![0; length];
        if reader.read_exact(&mut bytes).await.is_err() {
            return;
        }
        match head[0] {
            // An empty frame is the end of the input.
            STDIN if bytes.is_empty() => input = None,
            STDIN => {
                if let Some(fd) = input.as_ref().and_then(|fd| fd.try_clone().ok()) {
                    let written = crate::tasks::unblock(move || {
                        use std::io::Write;
                        File::from(fd).write_all(&bytes)
                    })
                    .await;
                    if written.is_err() {
                        input = None;
                    }
                }
            }
            WINDOW if bytes.len() == 4 => {
                let rows = u16::from_be_bytes([bytes[0], bytes[1]]);
                let columns = u16::from_be_bytes([bytes[2], bytes[3]]);
                if let Some(window) = &window {
                    // A size that the kernel refuses changes nothing.
                    let _ = crate::linux::process::set_terminal_size(window.as_fd(), rows, columns);
                }
            }
            _ => return,
        }
    }
}
