//! One request: its route, an endpoint, the answer.
//!
//! Request + table → the endpoint's answer, or a page that says why there is none. What never reached an endpoint is
//! given to another; what may have reached one is sent again only if repeating it is harmless (RFC 9110 9.2.2) and it has
//! no body.
//!
//! Invariant: a request that may have had an effect is sent once
//! (`a_request_that_may_have_worked_is_not_sent_again`).

use super::body::{InFlight, Outgoing, Progress, RequestBody, ResponseBody, full};
use super::clock::Clock;
use super::counts::add;
use super::headers::{self, Arrival, Target};
use super::pages::{page, wants_html};
use super::pool::{Lent, Pool};
use super::routes::{LiveRoute, Table};
use super::tls::Resolver;
use super::tunnel;
use crate::network::places::{Place, Places};
use crate::tasks::TaskGroup;
use futures_lite::future;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, LOCATION, UPGRADE};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode};
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

const ENDPOINTS_TRIED_MAX: usize = 3;
const CHALLENGES: &str = "/.well-known/acme-challenge/";

pub struct Proxy {
    pub table: Arc<RwLock<Arc<Table>>>,
    pub resolver: Arc<Resolver>,
    pub pool: Arc<Pool>,
    pub clock: Arc<Clock>,
    pub tasks: Arc<TaskGroup>,
    pub requests: Arc<Places>,
    /// Every wait here wakes its task that often: one that sleeps for longer waits for its client.
    pub nap_limit: Duration,
    pub unrouted: AtomicU64,
    /// Requests for which there was no place.
    pub refused: AtomicU64,
}

/// A request on its way, and what its attempts share.
struct Errand {
    live: Arc<LiveRoute>,
    parts: Parts,
    is_repeatable: bool,
    progress: Arc<Progress>,
}

enum Attempt {
    Answer(Response<Incoming>, Lent),
    /// The endpoint never had it; its body is whole.
    Unsent(Outgoing),
    /// It may have had it, and gave no answer.
    Lost,
    Late,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    NoEndpoint,
    Unreachable,
    Lost,
    Late,
    TooLarge,
    Unasked,
}

impl Failure {
    fn page(self, live: &LiveRoute, is_html: bool) -> Response<Outgoing> {
        let service = format!("{} of app {}", live.route.service, live.route.app);
        let (status, sentence) = match self {
            Failure::NoEndpoint => {
                (StatusCode::SERVICE_UNAVAILABLE, format!("no instance of {service} is ready now"))
            }
            Failure::Unreachable => (StatusCode::BAD_GATEWAY, format!("{service} can't be reached")),
            Failure::Lost => (StatusCode::BAD_GATEWAY, format!("{service} broke off without an answer")),
            Failure::Late => (StatusCode::GATEWAY_TIMEOUT, format!("{service} gave no answer in time")),
            Failure::TooLarge => too_large(live),
            Failure::Unasked => {
                (StatusCode::BAD_GATEWAY, format!("{service} switched to a protocol that nobody asked for"))
            }
        };
        page(status, &sentence, is_html)
    }
}

fn too_large(live: &LiveRoute) -> (StatusCode, String) {
    let max = live.route.options.request_bytes_max.unwrap_or_default();
    (StatusCode::PAYLOAD_TOO_LARGE, format!("the request's body is over {max} bytes"))
}

impl Proxy {
    pub async fn answer(
        self: Arc<Self>,
        arrival: Arrival,
        place: Arc<Place>,
        mut request: Request<Incoming>,
    ) -> Result<Response<Outgoing>, Infallible> {
        let upgrade = hyper::upgrade::on(&mut request);
        let (mut parts, body) = request.into_parts();
        let is_html = wants_html(&parts.headers);
        let refuse = |bad: headers::BadRequest| page(StatusCode::BAD_REQUEST, bad.text(), is_html);
        let target = match headers::target_of(&parts) {
            Ok(target) => target,
            Err(bad) => return Ok(refuse(bad)),
        };
        let table = self.table.read().unwrap_or_else(|poison| poison.into_inner()).clone();
        if let Some(answer) = challenge(&table, parts.uri.path()) {
            return Ok(answer);
        }
        let Some(live) = table.find(&target.host, parts.uri.path()).cloned() else {
            add(&self.unrouted, 1);
            let sentence = format!("no service answers for {}{}", target.host, parts.uri.path());
            return Ok(page(StatusCode::NOT_FOUND, &sentence, is_html));
        };
        add(&live.counters.requests, 1);
        let refusal = self.redirect(&live, &table, &parts, &target, arrival).or_else(|| {
            let (status, sentence) = exceeds(&live, &body).then(|| too_large(&live))?;
            Some(page(status, &sentence, is_html))
        });
        let response = if let Some(response) = refusal {
            response
        } else if let Some(request) = self.requests.take(arrival.client) {
            let in_flight = InFlight::new(live.counters.clone(), request);
            let upgrade = headers::wants_websocket(&parts).then_some((upgrade, place));
            match headers::make_outgoing(&mut parts, &target, arrival, body.size_hint().exact()) {
                Err(bad) => refuse(bad),
                Ok(()) => {
                    let passed = self.pass(live.clone(), parts, body, upgrade, in_flight).await;
                    passed.unwrap_or_else(|failure| failure.page(&live, is_html))
                }
            }
        } else {
            add(&self.refused, 1);
            page(StatusCode::SERVICE_UNAVAILABLE, "this node has too many requests now", is_html)
        };
        live.counters.count_answer(response.status());
        Ok(response)
    }

    /// To HTTPS. Not for ever (307): a browser would go there long after the certificate is gone.
    fn redirect(
        &self,
        live: &LiveRoute,
        table: &Table,
        parts: &Parts,
        target: &Target,
        arrival: Arrival,
    ) -> Option<Response<Outgoing>> {
        if arrival.is_tls || !live.route.options.redirects_to_https {
            return None;
        }
        self.resolver.certificate(&target.host)?;
        let port = match table.https_port() {
            443 => String::new(),
            port => format!(":{port}"),
        };
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let location = HeaderValue::from_str(&format!("https://{}{port}{path}", target.host)).ok()?;
        let mut response = Response::new(full("use HTTPS\n"));
        *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        response.headers_mut().insert(LOCATION, location);
        Some(response)
    }

    async fn pass(
        &self,
        live: Arc<LiveRoute>,
        parts: Parts,
        body: Incoming,
        upgrade: Option<(OnUpgrade, Arc<Place>)>,
        in_flight: InFlight,
    ) -> Result<Response<Outgoing>, Failure> {
        let progress = Progress::new();
        let is_repeatable = parts.method.is_idempotent() && body.is_end_stream();
        let body = RequestBody {
            inner: body,
            left: live.route.options.request_bytes_max,
            progress: progress.clone(),
            counters: live.counters.clone(),
        };
        let errand = Errand { live, parts, is_repeatable, progress };
        let (response, lent) = self.send(&errand, body.boxed_unsync()).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let upgrade = upgrade.filter(|_| headers::is_websocket(response.headers()));
            return self.switch(response, upgrade.ok_or(Failure::Unasked)?, in_flight);
        }
        let (mut parts, body) = response.into_parts();
        headers::make_incoming(&mut parts.headers);
        let idle_limit = errand.live.route.options.idle_limit;
        let body = ResponseBody::new(body, lent, self, idle_limit, in_flight);
        Ok(Response::from_parts(parts, body.boxed_unsync()))
    }

    async fn send(&self, errand: &Errand, body: Outgoing) -> Result<(Response<Incoming>, Lent), Failure> {
        let endpoints = self.pool.ordered(errand.live.endpoints_in_turn(ENDPOINTS_TRIED_MAX));
        let mut failure = if endpoints.is_empty() { Failure::NoEndpoint } else { Failure::Unreachable };
        let mut body = Some(body);
        for endpoint in endpoints {
            let mut is_fresh = false;
            loop {
                let lent = match self.pool.lend(endpoint, is_fresh).await {
                    Ok(lent) => lent,
                    Err(error) => {
                        tracing::debug!(%endpoint, error = %error, "an endpoint can't be reached");
                        break;
                    }
                };
                let was_reused = lent.is_reused;
                // Without one it is a repetition, and what is repeated has no body.
                let outgoing = body.take().unwrap_or_else(|| full(""));
                match self.attempt(errand, lent, outgoing).await {
                    Attempt::Answer(response, lent) => return Ok((response, lent)),
                    Attempt::Late => return Err(Failure::Late),
                    Attempt::Unsent(unsent) => body = Some(unsent),
                    Attempt::Lost if errand.progress.is_too_large.load(Ordering::Relaxed) => {
                        return Err(Failure::TooLarge);
                    }
                    Attempt::Lost if !errand.is_repeatable => return Err(Failure::Lost),
                    Attempt::Lost => failure = Failure::Lost,
                }
                add(&errand.live.counters.retries, 1);
                // One that had served before may just have been closed: the endpoint itself may be well.
                if !was_reused {
                    break;
                }
                is_fresh = true;
            }
        }
        Err(failure)
    }

    async fn attempt(&self, errand: &Errand, mut lent: Lent, body: Outgoing) -> Attempt {
        let mut request = Request::new(body);
        *request.method_mut() = errand.parts.method.clone();
        *request.uri_mut() = errand.parts.uri.clone();
        *request.headers_mut() = errand.parts.headers.clone();
        errand.progress.note();
        let answer = lent.sender.try_send_request(request);
        match self.wait(answer, &errand.progress, errand.live.route.options.response_limit).await {
            None => Attempt::Late,
            Some(Ok(response)) => Attempt::Answer(response, lent),
            Some(Err(mut error)) => {
                tracing::debug!(endpoint = %lent.endpoint, error = %error.error(), "an endpoint broke off");
                error.take_message().map_or(Attempt::Lost, |unsent| Attempt::Unsent(unsent.into_body()))
            }
        }
    }

    /// `None` when nothing has moved for `limit`: an upload may take longer than that.
    async fn wait<Output>(
        &self,
        work: impl Future<Output = Output>,
        progress: &Progress,
        limit: Duration,
    ) -> Option<Output> {
        future::or(async { Some(work.await) }, async {
            loop {
                let due = progress.last() + limit;
                if due <= Instant::now() {
                    return None;
                }
                self.clock.until(due.min(Instant::now() + self.nap_limit)).await;
            }
        })
        .await
    }

    /// From here on bytes pass both ways.
    fn switch(
        &self,
        mut response: Response<Incoming>,
        (client, place): (OnUpgrade, Arc<Place>),
        in_flight: InFlight,
    ) -> Result<Response<Outgoing>, Failure> {
        let endpoint = hyper::upgrade::on(&mut response);
        let (mut parts, _) = response.into_parts();
        headers::make_incoming(&mut parts.headers);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, headers::WEBSOCKET);
        self.tasks.spawn(async move {
            tunnel::join_upgraded(client, endpoint).await;
            drop((place, in_flight));
        });
        Ok(Response::from_parts(parts, full("")))
    }
}

fn exceeds(live: &LiveRoute, body: &Incoming) -> bool {
    let max = live.route.options.request_bytes_max;
    max.is_some_and(|max| body.size_hint().lower() > max)
}

fn challenge(table: &Table, path: &str) -> Option<Response<Outgoing>> {
    let answer = table.challenge(path.strip_prefix(CHALLENGES)?)?;
    let mut response = Response::new(full(answer.clone()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Some(response)
}
