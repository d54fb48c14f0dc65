//! Messages that many streams send are made once.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::Bundles;

/// The last message that was made of bundles and a revocation list, for all who would make the same.
#[derive(Debug, Default)]
pub struct Memo(Mutex<Option<Made>>);

#[derive(Debug)]
struct Made {
    bundles: Arc<Bundles>,
    crl: Option<Bytes>,
    message: Option<Bytes>,
}

impl Memo {
    /// The message for these, `None` if they make none. Others who want one wait while it is made.
    pub fn message(
        &self,
        bundles: &Arc<Bundles>,
        crl: Option<&Bytes>,
        make: impl FnOnce() -> Option<Bytes>,
    ) -> Option<Bytes> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made.as_ref()
            && Arc::ptr_eq(&made.bundles, bundles)
            && made.crl.as_ref() == crl
        {
            return made.message.clone();
        }
        let message = make();
        *made = Some(Made {
            bundles: Arc::clone(bundles),
            crl: crl.cloned(),
            message: message.clone(),
        });
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::tests::{Authority, DOMAIN, message};

    #[test]
    fn a_message_is_made_once_for_each_state() {
        let authority = Authority::new(DOMAIN);
        let bundles =
            || Arc::new(Bundles::from_authority(&message(DOMAIN, &[&authority])).unwrap());
        let (one, two) = (bundles(), bundles());
        let [a, b] = ["a", "b"].map(|text| Bytes::from_static(text.as_bytes()));
        let memo = Memo::default();
        let mut made = 0;
        let mut ask = |bundles: &Arc<Bundles>, crl: Option<&Bytes>| {
            let mut fresh = false;
            let message = memo.message(bundles, crl, || {
                fresh = true;
                made += 1;
                (made != 3).then(|| Bytes::from(made.to_string()))
            });
            (message, fresh)
        };
        let (first, fresh) = ask(&one, None);
        assert!(fresh);
        let (again, fresh) = ask(&one, None);
        assert!(
            !fresh && again.unwrap().as_ptr() == first.unwrap().as_ptr(),
            "the same memory"
        );
        for (bundles, crl) in [
            (&one, Some(&a)),
            (&one, Some(&b)),
            (&two, Some(&b)),
            (&two, None),
        ] {
            assert!(ask(bundles, crl).1);
            assert!(!ask(bundles, crl).1);
        }
    }
}
