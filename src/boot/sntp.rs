//! The time from the network, and what to do with it (RFC 4330). Pure.
//!
//! Input: a reply's bytes and the four times around it. Output: how far the own clock is off, and whether to step or to
//! slew. The clock is never set from a server that is not synchronised itself, nor before the floor: a time that has
//! been already.

use std::time::Duration;

/// Between 1900, where NTP counts from, and 1970.
const EPOCH_S: u64 = 2_208_988_800;
const PACKET_BYTES: usize = 48;
/// Beyond this the clock is set at once: slewing half a second takes a quarter of an hour.
pub const STEP_OVER_US: i64 = 500_000;
/// A round trip longer than this tells too little.
const DELAY_US_MAX: i64 = 2_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Correction {
    /// Set the clock to this, since 1970.
    Step(Duration),
    Slew {
        offset_us: i64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub offset_us: i64,
    /// Of the round trip; half of it bounds the error.
    pub delay_us: i64,
}

/// A question; `sent` comes back in the answer and proves that it is one.
pub fn request(sent: Duration) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    // Version 4, a client.
    packet[0] = 0x23;
    packet[40..48].copy_from_slice(&to_ntp(sent).to_be_bytes());
    packet
}

fn to_ntp(since_1970: Duration) -> u64 {
    let seconds = since_1970.as_secs().wrapping_add(EPOCH_S) & 0xffff_ffff;
    (seconds << 32) | ((u64::from(since_1970.subsec_nanos()) << 32) / 1_000_000_000)
}

/// In microseconds since 1970. The counter of 32 bits turns over in 2036; what is below 2^31 is taken for later.
fn from_ntp(bytes: &[u8]) -> Option<i64> {
    let value = u64::from_be_bytes(bytes.try_into().ok()?);
    let mut seconds = value >> 32;
    if seconds & 0x8000_0000 == 0 {
        seconds += 1 << 32;
    }
    let micros = ((value & 0xffff_ffff) * 1_000_000) >> 32;
    Some((seconds - EPOCH_S) as i64 * 1_000_000 + micros as i64)
}

/// What an answer says; `None` if it is none to the question sent at `sent`, or its server does not know the time.
pub fn sample(reply: &[u8], sent: Duration, received: Duration) -> Option<Sample> {
    let reply = reply.get(..PACKET_BYTES)?;
    let (leap, mode, stratum) = (reply[0] >> 6, reply[0] & 7, reply[1]);
    if mode != 4 || leap == 3 || !(1..=15).contains(&stratum) || reply[24..32] != to_ntp(sent).to_be_bytes() {
        return None;
    }
    let (arrived, left) = (from_ntp(&reply[32..40])?, from_ntp(&reply[40..48])?);
    let (sent_us, received_us) = (sent.as_micros() as i64, received.as_micros() as i64);
    let delay_us = (received_us - sent_us) - (left - arrived);
    if !(0..=DELAY_US_MAX).contains(&delay_us) {
        return None;
    }
    let offset_us = ((arrived - sent_us) + (left - received_us)) / 2;
    Some(Sample { offset_us, delay_us })
}

/// `None`: the server's time lies before the floor, so it is wrong.
pub fn correction(sample: Sample, now: Duration, floor: Duration) -> Option<Correction> {
    let right_us = now.as_micros() as i64 + sample.offset_us;
    let right = Duration::from_micros(u64::try_from(right_us).ok()?);
    if right < floor {
        return None;
    }
    if sample.offset_us.abs() > STEP_OVER_US {
        return Some(Correction::Step(right));
    }
    Some(Correction::Slew { offset_us: sample.offset_us })
}

/// A server's answer at `time`, for tests.
#[cfg(test)]
fn reply_at(request: &[u8; PACKET_BYTES], time: Duration) -> [u8; PACKET_BYTES] {
    let mut reply = [0; PACKET_BYTES];
    reply[0] = 0x24;
    reply[1] = 2;
    reply[24..32].copy_from_slice(&request[40..48]);
    reply[32..40].copy_from_slice(&to_ntp(time).to_be_bytes());
    reply[40..48].copy_from_slice(&to_ntp(time).to_be_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_790_000_000);
    const FLOOR: Duration = Duration::from_secs(1_780_000_000);

    fn check(own: Duration, true_time: Duration) -> (Sample, Option<Correction>) {
        let question = request(own);
        let reply = reply_at(&question, true_time + Duration::from_millis(10));
        let sample = sample(&reply, own, own + Duration::from_millis(20)).unwrap();
        (sample, correction(sample, own + Duration::from_millis(20), FLOOR))
    }

    #[test]
    fn a_small_error_is_slewed_and_a_large_one_stepped() {
        let (sample, fix) = check(NOW, NOW + Duration::from_millis(200));
        assert!((sample.offset_us - 200_000).abs() <= 1 && sample.delay_us == 20_000, "{sample:?}");
        assert!(matches!(fix, Some(Correction::Slew { .. })));
        let (_, fix) = check(Duration::from_secs(3), NOW);
        let Some(Correction::Step(time)) = fix else { panic!("1970 is left at once") };
        assert!(time.abs_diff(NOW) < Duration::from_millis(50), "{time:?}");
    }

    #[test]
    fn the_counter_may_turn_over() {
        let after_2036 = Duration::from_secs(2_090_000_000);
        let (sample, _) = check(NOW, after_2036);
        assert!((sample.offset_us / 1_000_000 - 300_000_000).abs() <= 1, "{sample:?}");
    }

    #[test]
    fn a_server_that_is_wrong_or_another_s_answer_is_refused() {
        let (_, fix) = check(NOW, FLOOR - Duration::from_secs(60));
        assert_eq!(fix, None, "before the floor");
        let question = request(NOW);
        let good = reply_at(&question, NOW);
        let wrong = |change: &dyn Fn(&mut [u8; 48])| {
            let mut reply = good;
            change(&mut reply);
            sample(&reply, NOW, NOW + Duration::from_millis(20))
        };
        assert!(wrong(&|_| ()).is_some());
        assert_eq!(wrong(&|reply| reply[0] = 0xe4), None, "not synchronised");
        assert_eq!(wrong(&|reply| reply[1] = 0), None, "kiss of death");
        assert_eq!(wrong(&|reply| reply[30] ^= 1), None, "no answer to this question");
        assert_eq!(sample(&good[..40], NOW, NOW), None);
    }
}
