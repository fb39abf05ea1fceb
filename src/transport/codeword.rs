//! Secrets as text that people copy: a prefix, then base32 with a checksum.
//!
//! Bytes → `tdc-join-…` and back. A mistyped character is told as such, because the checksum covers prefix and bytes.
//! The alphabet is Crockford's (no i, l, o, u): reading forgives case, dashes and the look-alikes 0/o and 1/i/l.
//!
//! Invariant: decoding what was encoded gives the same bytes, and one wrong character gives an error
//! (`one_wrong_character_is_noticed`).

use ring::digest::{SHA256, digest};

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const CHECKSUM_BYTES: usize = 4;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodewordError {
    #[error("it doesn't begin with `{prefix}`")]
    Prefix { prefix: &'static str },
    #[error("`{character}` can't occur in it")]
    Character { character: char },
    #[error("it is mistyped or cut off (its checksum doesn't match); copy the whole line again")]
    Checksum,
}

fn checksum(prefix: &str, bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut input = prefix.as_bytes().to_vec();
    input.extend_from_slice(bytes);
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&digest(&SHA256, &input).as_ref()[..CHECKSUM_BYTES]);
    sum
}

/// `prefix` ends in a dash and is part of the text.
pub fn encode(prefix: &'static str, bytes: &[u8]) -> String {
    let mut text = String::from(prefix);
    let (mut pending, mut bits) = (0u32, 0u32);
    for byte in bytes.iter().chain(&checksum(prefix, bytes)) {
        pending = (pending << 8) | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[(pending >> bits) as usize & 31]));
        }
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[(pending << (5 - bits)) as usize & 31]));
    }
    text
}

pub fn decode(prefix: &'static str, text: &str) -> Result<Vec<u8>, CodewordError> {
    let lower = text.trim().to_ascii_lowercase();
    let body = lower.strip_prefix(prefix).ok_or(CodewordError::Prefix { prefix })?;
    let (mut bytes, mut pending, mut bits) = (Vec::new(), 0u32, 0u32);
    for character in body.chars().filter(|character| *character != '-') {
        let digit = match character {
            'o' => '0',
            'i' | 'l' => '1',
            other => other,
        };
        let value = ALPHABET
            .iter()
            .position(|letter| char::from(*letter) == digit)
            .ok_or(CodewordError::Character { character })?;
        pending = ((pending << 5) | value as u32) & 0xfff;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push((pending >> bits) as u8);
        }
    }
    let padding_is_zero = pending & ((1 << bits) - 1) == 0;
    let length = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(CodewordError::Checksum)?;
    let sum = bytes.split_off(length);
    if !padding_is_zero || bits >= 5 || sum != checksum(prefix, &bytes) {
        return Err(CodewordError::Checksum);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_what_was_encoded_gives_the_same_bytes() {
        for length in 0..70u8 {
            let bytes: Vec<u8> = (0..length).map(|index| index.wrapping_mul(37)).collect();
            let text = encode("tdc-x-", &bytes);
            assert_eq!(decode("tdc-x-", &text), Ok(bytes.clone()));
            assert_eq!(decode("tdc-x-", &format!(" {}\n", text.to_ascii_uppercase())), Ok(bytes));
        }
    }

    #[test]
    fn one_wrong_character_is_noticed() {
        let text = encode("tdc-x-", b"sixteen bytes ok");
        for position in "tdc-x-".len()..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[position] = if wrong[position] == b'7' { b'8' } else { b'7' };
            let wrong = String::from_utf8(wrong).unwrap();
            assert_eq!(decode("tdc-x-", &wrong), Err(CodewordError::Checksum), "{wrong}");
        }
        assert_eq!(decode("tdc-x-", &text[..text.len() - 2]), Err(CodewordError::Checksum));
        assert_eq!(decode("tdc-y-", &text), Err(CodewordError::Prefix { prefix: "tdc-y-" }));
        assert_eq!(decode("tdc-x-", "tdc-x-abü"), Err(CodewordError::Character { character: 'ü' }));
    }
}
