//! What a client reads when there is no answer of a service.
//!
//! Status, sentence and the request's `Accept` → a small page for browsers, one line for everything else. It names the
//! host that was asked for and no address.

use super::body::{Outgoing, full};
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

/// Text in HTML: what clients send must not become markup.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            _ => escaped.push(letter),
        }
    }
    escaped
}

pub fn wants_html(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepts.flat_map(|value| value.split(',')).any(|part| part.trim().starts_with("text/html"))
}

pub fn page(status: StatusCode, sentence: &str, is_html: bool) -> Response<Outgoing> {
    let title = format!("{} {}", status.as_u16(), status.canonical_reason().unwrap_or("Error"));
    let (kind, text) = if is_html {
        let text = format!(
            "<!doctype html><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <title>{title}</title><body style=\"font:1rem/1.5 sans-serif;max-width:36rem;margin:4rem auto;\
             padding:0 1rem\"><h1 style=\"font-size:1.25rem\">{title}</h1><p>{}</p>\n",
            escaped(sentence)
        );
        ("text/html; charset=utf-8", text)
    } else {
        ("text/plain; charset=utf-8", format!("{title}: {sentence}\n"))
    };
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        // An instance that is being started elsewhere takes a few seconds.
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("3"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_gets_a_page_and_others_a_line() {
        for (accept, wanted) in [
            (Some("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"), "text/html; charset=utf-8"),
            (Some("*/*"), "text/plain; charset=utf-8"),
            (Some("application/json"), "text/plain; charset=utf-8"),
            (None, "text/plain; charset=utf-8"),
        ] {
            let mut headers = HeaderMap::new();
            headers.extend(accept.map(|accept| (ACCEPT, HeaderValue::from_static(accept))));
            let response = page(StatusCode::SERVICE_UNAVAILABLE, "soon", wants_html(&headers));
            assert_eq!(response.headers()[CONTENT_TYPE], wanted, "{accept:?}");
            assert_eq!(response.headers()[RETRY_AFTER], "3");
        }
    }

    #[test]
    fn what_a_client_sends_is_no_markup() {
        assert_eq!(escaped("<a href=\"&\">"), "&lt;a href=&quot;&amp;&quot;&gt;");
    }
}
