//! When a certificate begins and ends.
//!
//! webpki checks these fields and shows them only where they don't hold: it is asked for the first and the last moment
//! that there are, which spares a second parser of X.509 (85 kB).

use rustls::pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use webpki::{EndEntityCert, Error, KeyUsage};

/// As rustls accepts a certificate's own time: seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: u64,
    pub not_after: u64,
}

/// `None` where webpki can't read the certificate, or it ends before it begins.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<Validity> {
    let parsed = EndEntityCert::try_from(certificate).ok()?;
    let complaint_at = |second: u64| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(second));
        // Without anchors there is always one; dates are looked at before anchors are.
        parsed.verify_for_usage(&[], &[], &[], time, KeyUsage::server_auth(), None, None).err()
    };
    let not_after = match complaint_at(u64::MAX)? {
        Error::CertExpired { not_after, .. } => not_after.as_secs(),
        _ => return None,
    };
    let not_before = match complaint_at(0)? {
        Error::CertNotValidYet { not_before, .. } => not_before.as_secs(),
        // It holds from 1970 on, as those of nodes do, whose clocks may be wrong.
        _ => 0,
    };
    Some(Validity { not_before, not_after })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    fn made(from: rcgen::CertificateParams) -> CertificateDer<'static> {
        from.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn of_years(begin: i32, end: i32) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(["shop.example.org".to_string()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(begin, 3, 1), date_time_ymd(end, 1, 31));
        made(params)
    }

    #[test]
    fn both_ends_are_read() {
        let found = validity(&of_years(2024, 2031)).unwrap();
        assert_eq!(found, Validity { not_before: 1_709_251_200, not_after: 1_927_584_000 });
        // Past 2049 the field has another form.
        assert_eq!(validity(&of_years(2024, 2099)).unwrap().not_after, 4_073_500_800);
    }

    #[test]
    fn one_that_holds_from_the_first_second_on_is_read() {
        let mut params = CertificateParams::new(["a".to_string()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(1970, 1, 1), date_time_ymd(9999, 12, 31));
        let found = validity(&made(params)).unwrap();
        assert_eq!(found, Validity { not_before: 0, not_after: 253_402_214_400 });
    }

    #[test]
    fn what_is_none_and_what_ends_before_it_begins_has_no_validity() {
        assert_eq!(validity(&CertificateDer::from(&b"\x30\x03\x02\x01\x00"[..])), None);
        assert_eq!(validity(&of_years(2031, 2024)), None);
    }

    /// Many self-made certificates are of this kind.
    #[test]
    fn an_authority_s_own_certificate_is_read() {
        let mut params = CertificateParams::new(["nas.example.org".to_string()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (date_time_ymd(2024, 3, 1), date_time_ymd(2031, 1, 31));
        assert_eq!(validity(&made(params)).unwrap().not_after, 1_927_584_000);
    }
}
