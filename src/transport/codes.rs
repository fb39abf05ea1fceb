//! The code that a machine shows, and how often it may be guessed.
//!
//! A wish to show one, tries and their outcome → what may be tried now. Holds no clock. A code lives in memory only.
//! Five wrong tries end it, and nothing may be tried for 10 s after that, doubling to an hour until one was right: a
//! guesser with a million addresses still has about a hundred and twenty tries a day at a million codes.
//!
//! Invariant: no code is compared more than five times with a wrong one (`five_wrong_tries_end_a_code`), also when the
//! tries overlap (`a_try_of_a_code_that_ended_meanwhile_is_wrong`).

use std::time::{Duration, Instant};

use super::hello::{Refusal, RefusalCode};
use super::sealing::{SealError, random_bytes};

pub const WRONG_TRIES_MAX: u8 = 5;
const CODE_DIGITS: usize = 6;
const PAUSE_MIN: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(3600);

/// What somebody may do who knows the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Take this machine, which belongs to no cluster, into one, or found one on it.
    Machine,
    /// Use the cluster from a laptop under this name.
    Person { name: String, is_viewer: bool },
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// Another code takes its place after too many wrong tries.
    Renewed,
    /// It ends after too many wrong tries; somebody asks for another.
    Asked,
    /// As `Asked`, but no display shows it: two machines agreed on it.
    Hidden,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub code: String,
    pub grant: Grant,
    pub lasting: Lasting,
    pub until: Option<Instant>,
    pub wrong_tries: u8,
}

/// What a try came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    Right(Grant),
    Wrong {
        left: u8,
    },
    /// The code has ended; `Some`: this one is shown now.
    Ended {
        next: Option<String>,
    },
}

#[derive(Default)]
pub struct Codes {
    shown: Option<Shown>,
    pause: Duration,
    opens_at: Option<Instant>,
}

/// Six digits, each code as likely as another.
pub fn make_code() -> Result<String, SealError> {
    // Of 2^64 numbers the last 551,616 would favour some codes: by less than one in 10^13.
    let number = u64::from_le_bytes(random_bytes()?) % 10_u64.pow(CODE_DIGITS as u32);
    Ok(format!("{number:0width$}", width = CODE_DIGITS))
}

/// A code as people type it: `493112`, `493 112`, `493-112`.
pub fn parse_code(text: &str) -> Option<String> {
    let digits: String = text.chars().filter(|c| !matches!(c, ' ' | '-')).collect();
    let is_code = digits.len() == CODE_DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_code.then_some(digits)
}

impl Codes {
    /// Shows a code instead of the one before, if any.
    pub fn show(&mut self, shown: Shown) {
        self.shown = Some(shown);
    }

    pub fn show_again(&mut self, shown: Shown, now: Instant) {
        if self.valid(now).is_none() {
            self.shown = Some(shown);
        }
    }

    /// The code that a display may show.
    pub fn displayed(&self, now: Instant) -> Option<&Shown> {
        self.valid(now).filter(|shown| shown.lasting != Lasting::Hidden)
    }

    fn valid(&self, now: Instant) -> Option<&Shown> {
        self.shown.as_ref().filter(|shown| shown.until.is_none_or(|until| now < until))
    }

    /// The code to try now; `None`: there is none, which the asker is not told.
    pub fn open(&self, now: Instant) -> Result<Option<Shown>, Refusal> {
        self.check_pause(now)?;
        Ok(self.valid(now).cloned())
    }

    fn check_pause(&self, now: Instant) -> Result<(), Refusal> {
        match self.opens_at.map(|at| at.saturating_duration_since(now)) {
            Some(left) if !left.is_zero() => Err(Refusal::new(
                RefusalCode::TooManyFailures,
                format!("too many wrong codes; try the code that is shown now in {} s", left.as_secs() + 1),
            )),
            _ => Ok(()),
        }
    }

    /// Counts a try. A right one of a code that is shown no more is wrong.
    pub fn settle(&mut self, tried: &Shown, is_right: bool, now: Instant) -> Result<Settled, SealError> {
        let is_current = self.valid(now).is_some_and(|shown| shown.code == tried.code);
        if !is_current || self.check_pause(now).is_err() {
            return Ok(Settled::Wrong { left: 0 });
        }
        if is_right {
            (self.pause, self.opens_at) = (Duration::ZERO, None);
            if tried.grant != Grant::Machine {
                self.shown = None;
            }
            return Ok(Settled::Right(tried.grant.clone()));
        }
        let Some(shown) = &mut self.shown else { return Ok(Settled::Wrong { left: 0 }) };
        shown.wrong_tries += 1;
        if shown.wrong_tries < WRONG_TRIES_MAX {
            return Ok(Settled::Wrong { left: WRONG_TRIES_MAX - shown.wrong_tries });
        }
        self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        self.opens_at = Some(now + self.pause);
        let next = match shown.lasting {
            Lasting::Renewed => Some(make_code()?),
            Lasting::Asked | Lasting::Hidden => None,
        };
        self.shown = next.clone().map(|code| Shown { code, wrong_tries: 0, ..tried.clone() });
        Ok(Settled::Ended { next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(code: &str, lasting: Lasting) -> Shown {
        Shown { code: code.into(), grant: Grant::Machine, lasting, until: None, wrong_tries: 0 }
    }

    #[test]
    fn five_wrong_tries_end_a_code() {
        for lasting in [Lasting::Renewed, Lasting::Asked] {
            let (mut codes, now) = (Codes::default(), Instant::now());
            codes.show(shown("111111", lasting));
            for left in (1..WRONG_TRIES_MAX).rev() {
                let tried = codes.open(now).unwrap().unwrap();
                assert_eq!(codes.settle(&tried, false, now).unwrap(), Settled::Wrong { left });
            }
            let tried = codes.open(now).unwrap().unwrap();
            let Settled::Ended { next } = codes.settle(&tried, false, now).unwrap() else { panic!("ended") };
            assert_eq!(next.is_some(), lasting == Lasting::Renewed);
            assert_eq!(codes.displayed(now).map(|shown| shown.code.clone()), next);
            assert_eq!(codes.open(now).unwrap_err().code, RefusalCode::TooManyFailures);
            assert!(codes.open(now + PAUSE_MIN).is_ok());
        }
    }

    #[test]
    fn a_try_of_a_code_that_ended_meanwhile_is_wrong() {
        let (mut codes, now) = (Codes::default(), Instant::now());
        codes.show(shown("111111", Lasting::Renewed));
        let early = codes.open(now).unwrap().unwrap();
        for _ in 0..WRONG_TRIES_MAX {
            let _ = codes.settle(&early, false, now).unwrap();
        }
        let later = now + PAUSE_MIN;
        assert_eq!(codes.settle(&early, true, later).unwrap(), Settled::Wrong { left: 0 });
        let tried = codes.open(later).unwrap().unwrap();
        assert_eq!(tried.wrong_tries, 0, "nor does it count against the next code");
    }

    #[test]
    fn pauses_double_until_a_try_is_right() {
        let (mut codes, mut now) = (Codes::default(), Instant::now());
        codes.show(shown("111111", Lasting::Renewed));
        for seconds in [10, 20, 40, 80] {
            for _ in 0..WRONG_TRIES_MAX {
                let tried = codes.open(now).unwrap().unwrap();
                let _ = codes.settle(&tried, false, now).unwrap();
            }
            assert!(codes.open(now + Duration::from_secs(seconds - 1)).is_err());
            now += Duration::from_secs(seconds);
        }
        let tried = codes.open(now).unwrap().unwrap();
        assert_eq!(codes.settle(&tried, true, now).unwrap(), Settled::Right(Grant::Machine));
        assert_eq!(codes.pause, Duration::ZERO);
    }

    #[test]
    fn a_person_s_code_serves_once_and_ends_with_its_time() {
        let (mut codes, now) = (Codes::default(), Instant::now());
        let until = Some(now + Duration::from_secs(600));
        let grant = Grant::Person { name: "ann".into(), is_viewer: false };
        let person = Shown { grant: grant.clone(), until, ..shown("222222", Lasting::Asked) };
        codes.show(person.clone());
        assert_eq!(codes.open(now + Duration::from_secs(600)).unwrap(), None);
        assert_eq!(codes.settle(&person, true, now).unwrap(), Settled::Right(grant));
        assert_eq!(codes.open(now).unwrap(), None);
    }

    #[test]
    fn a_code_is_six_digits_as_people_type_them() {
        let made = make_code().unwrap();
        assert_eq!(parse_code(&made), Some(made.clone()));
        assert_eq!(parse_code("493 112").as_deref(), Some("493112"));
        assert_eq!(parse_code("493-112").as_deref(), Some("493112"));
        for bad in ["", "49311", "4931122", "49311x", "４９３１１２"] {
            assert_eq!(parse_code(bad), None, "{bad}");
        }
    }
}
