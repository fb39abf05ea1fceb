//! Bodies on their way through: piece by piece, counted, bounded, and never waited for without end.

use super::clock::{Clock, Sleep};
use super::counts::{RouteCounters, add};
use super::pool::{Lent, Pool};
use super::proxy::Proxy;
use crate::network::places::Place;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
pub type Outgoing = UnsyncBoxBody<Bytes, BodyError>;

#[derive(Debug, thiserror::Error)]
pub enum BodyEnd {
    #[error("the body is over its limit")]
    TooLarge,
    #[error("no part of the body came in time")]
    Late,
}

pub fn full(bytes: impl Into<Bytes>) -> Outgoing {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// What the sender of a request's body and who waits for the answer share.
#[derive(Debug)]
pub struct Progress {
    begin: Instant,
    /// Since `begin`, of the last piece that went on its way.
    last_ms: AtomicU64,
    pub is_too_large: AtomicBool,
}

impl Progress {
    pub fn new() -> Arc<Progress> {
        Arc::new(Progress {
            begin: Instant::now(),
            last_ms: AtomicU64::new(0),
            is_too_large: AtomicBool::new(false),
        })
    }

    pub fn note(&self) {
        let ms = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(ms, Ordering::Relaxed);
    }

    pub fn last(&self) -> Instant {
        self.begin + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }
}

/// A client's body on its way to an endpoint.
pub struct RequestBody {
    pub inner: Incoming,
    /// Bytes that may still come; `None`: any number.
    pub left: Option<u64>,
    pub progress: Arc<Progress>,
    pub counters: Arc<RouteCounters>,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            let length = frame.data_ref().map_or(0, |data| data.len() as u64);
            self.progress.note();
            add(&self.counters.bytes_in, length);
            if let Some(left) = self.left {
                let Some(rest) = left.checked_sub(length) else {
                    self.progress.is_too_large.store(true, Ordering::Relaxed);
                    return Poll::Ready(Some(Err(BodyEnd::TooLarge.into())));
                };
                self.left = Some(rest);
            }
        }
        polled.map(|frame| frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// One request of a route, until its answer has gone.
pub struct InFlight {
    counters: Arc<RouteCounters>,
    /// Among the requests that endpoints work on.
    _place: Arc<Place>,
}

impl InFlight {
    pub fn new(counters: Arc<RouteCounters>, place: Arc<Place>) -> InFlight {
        add(&counters.in_flight, 1);
        InFlight { counters, _place: place }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.counters.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An endpoint's body on its way to a client. At its end the connection goes back to the pool; without one it is closed.
pub struct ResponseBody {
    inner: Incoming,
    lent: Option<Lent>,
    pool: Arc<Pool>,
    idle_limit: Duration,
    nap_limit: Duration,
    clock: Arc<Clock>,
    /// Since when the endpoint is waited for.
    idle_since: Option<Instant>,
    nap: Option<Sleep>,
    in_flight: InFlight,
}

impl ResponseBody {
    pub fn new(
        inner: Incoming,
        lent: Lent,
        proxy: &Proxy,
        idle_limit: Duration,
        in_flight: InFlight,
    ) -> ResponseBody {
        let mut body = ResponseBody {
            inner,
            lent: Some(lent),
            pool: proxy.pool.clone(),
            idle_limit,
            nap_limit: proxy.nap_limit,
            clock: proxy.clock.clone(),
            idle_since: None,
            nap: None,
            in_flight,
        };
        body.give_back_at_end();
        body
    }

    /// Ends when the endpoint has said nothing for too long; wakes its task more often than a stalled one is ended.
    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let due = *self.idle_since.get_or_insert_with(Instant::now) + self.idle_limit;
        loop {
            let now = Instant::now();
            if now >= due {
                return Poll::Ready(());
            }
            let nap = self.nap.get_or_insert_with(|| self.clock.until(due.min(now + self.nap_limit)));
            ready!(Pin::new(nap).poll(context));
            self.nap = None;
        }
    }

    fn give_back_at_end(&mut self) {
        if self.inner.is_end_stream()
            && let Some(lent) = self.lent.take()
        {
            self.pool.give_back(lent);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(polled) = Pin::new(&mut self.inner).poll_frame(context) else {
            return self.poll_idle(context).map(|()| Some(Err(BodyEnd::Late.into())));
        };
        (self.idle_since, self.nap) = (None, None);
        match &polled {
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                add(&self.in_flight.counters.bytes_out, length);
                self.give_back_at_end();
            }
            Some(Err(_)) => self.lent = None,
            None => {
                if let Some(lent) = self.lent.take() {
                    self.pool.give_back(lent);
                }
            }
        }
        Poll::Ready(polled.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
