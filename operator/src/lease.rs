//! One operator acts at a time: the holder of a Lease.
//!
//! After client-go's rules: every write carries the resourceVersion that was read, so of two
//! contenders one is refused; and a foreign lease counts as ended when its record has not changed
//! for its whole duration by *our* monotonic clock, so that clocks need not agree. The Lease is no
//! fence (a holder may be frozen while it ends): the term is. See `control/v1/term`.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::admin::Vitals;

/// How long a lease lasts without renewal.
pub const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for this long gives up.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two tries.
pub const RETRY_EVERY: Duration = Duration::from_secs(2);
/// A call to the API server takes at most this long, so that a hanging one does not eat the deadline.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

// A holder must have stopped before another may begin.
const _: () = assert!(RENEW_DEADLINE.as_secs() < DURATION.as_secs());
const _: () = assert!(CALL_TIMEOUT.as_secs() + RETRY_EVERY.as_secs() < RENEW_DEADLINE.as_secs());

/// Why leading ended.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// It may be somebody else's now. The process must end at once.
    #[error("the lease could not be renewed for {} s", RENEW_DEADLINE.as_secs())]
    Lost,
}

/// Whose lease it is, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    holder: String,
    duration: Duration,
    transitions: i32,
    resource_version: String,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is none: make it.
    Create,
    /// It is free, or ours by name from an earlier try: write ourselves in.
    Take,
    /// It is ours: write the time.
    Renew,
    /// It is somebody else's: look again later.
    Wait,
}

/// What one contender knows. Pure: fed with records and with the monotonic clock.
#[derive(Debug)]
struct Contender {
    identity: String,
    seen: Option<(String, Instant)>,
}

impl Contender {
    fn new(identity: String) -> Self {
        Self {
            identity,
            seen: None,
        }
    }

    /// Judges a record that was read at `now`.
    fn judge(&mut self, record: Option<&Record>, now: Instant) -> Step {
        let Some(record) = record else {
            self.seen = None;
            return Step::Create;
        };
        let since = match &self.seen {
            Some((version, since)) if *version == record.resource_version => *since,
            _ => {
                self.seen = Some((record.resource_version.clone(), now));
                now
            }
        };
        if record.holder == self.identity {
            Step::Renew
        } else if record.holder.is_empty() || record.duration < now.duration_since(since) {
            Step::Take
        } else {
            Step::Wait
        }
    }
}

/// The Lease and our claim to it.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    contender: Contender,
    vitals: Vitals,
}

impl Elector {
    /// A contender for the Lease of this name. The identity is new for each process, so that a
    /// restarted pod does not take itself for its predecessor.
    pub fn new(client: Client, namespace: &str, name: &str, pod: &str, vitals: Vitals) -> Self {
        let identity = format!("{pod}_{}", uuid::Uuid::new_v4());
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            contender: Contender::new(identity),
            vitals,
        }
    }

    /// The name under which we hold it.
    pub fn identity(&self) -> &str {
        &self.contender.identity
    }

    /// Waits until the lease is ours, then keeps it until `stop` (and releases it) or until it is
    /// lost. `leading` becomes true in between.
    ///
    /// # Errors
    /// When the lease was lost.
    pub async fn run(
        mut self,
        leading: watch::Sender<bool>,
        stop: CancellationToken,
    ) -> Result<(), LeaseError> {
        let mut renewed = None::<Instant>;
        loop {
            self.vitals.lease.beat();
            // Counted from before the request: what the API server wrote later must not be counted on.
            let tried_at = Instant::now();
            match tokio::time::timeout(CALL_TIMEOUT, self.attempt(tried_at)).await {
                Ok(Ok(true)) => {
                    self.vitals.api_server.beat();
                    if renewed.replace(tried_at).is_none() {
                        info!(holder = self.identity(), "leads");
                        leading.send_replace(true);
                    }
                }
                Ok(Ok(false)) if renewed.is_some() => return Err(LeaseError::Lost),
                Ok(Ok(false)) => self.vitals.api_server.beat(),
                Ok(Err(error)) => warn!(%error, "cannot read or write the lease"),
                Err(_) => warn!("the API server did not answer about the lease in time"),
            }
            if renewed.is_some_and(|renewed| RENEW_DEADLINE < renewed.elapsed()) {
                return Err(LeaseError::Lost);
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY_EVERY) => {}
                () = stop.cancelled() => {
                    if renewed.is_some() {
                        self.release().await;
                    }
                    return Ok(());
                }
            }
        }
    }

    /// One look and, if it may, one write. Answers whether the lease is ours.
    async fn attempt(&mut self, now: Instant) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(&self.name).await?;
        let record = lease.as_ref().map(record);
        let step = self.contender.judge(record.as_ref(), now);
        let written = match (step, lease) {
            (Step::Wait, _) => return Ok(false),
            (Step::Create, _) | (_, None) => {
                let lease = Lease {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        ..ObjectMeta::default()
                    },
                    spec: Some(self.spec(0, None)),
                };
                self.api.create(&PostParams::default(), &lease).await
            }
            (Step::Take | Step::Renew, Some(mut lease)) => {
                let old = lease.spec.take().unwrap_or_default();
                let transitions = old.lease_transitions.unwrap_or(0);
                lease.spec = Some(if step == Step::Renew {
                    self.spec(transitions, old.acquire_time)
                } else {
                    self.spec(transitions + 1, None)
                });
                self.api
                    .replace(&self.name, &PostParams::default(), &lease)
                    .await
            }
        };
        match written {
            Ok(_) => Ok(true),
            // Somebody was quicker: the next look tells who.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Ok(step == Step::Renew && self.is_still_ours().await?)
            }
            Err(error) => Err(error),
        }
    }

    async fn is_still_ours(&self) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(&self.name).await?;
        Ok(lease.is_some_and(|lease| record(&lease).holder == self.contender.identity))
    }

    /// Gives the lease away, so that the next one need not wait for its end.
    async fn release(&self) {
        let released = async {
            let Some(mut lease) = self.api.get_opt(&self.name).await? else {
                return Ok(());
            };
            if record(&lease).holder != self.contender.identity {
                return Ok(());
            }
            let spec = lease.spec.get_or_insert_default();
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            self.api
                .replace(&self.name, &PostParams::default(), &lease)
                .await?;
            Ok::<(), kube::Error>(())
        };
        match tokio::time::timeout(CALL_TIMEOUT, released).await {
            Ok(Ok(())) => info!("released the lease"),
            Ok(Err(error)) => warn!(%error, "could not release the lease; it ends by itself"),
            Err(_) => warn!("could not release the lease in time; it ends by itself"),
        }
    }

    fn spec(&self, transitions: i32, acquired: Option<MicroTime>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.contender.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.unwrap_or(0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
        transitions: spec.lease_transitions.unwrap_or(0),
        resource_version: lease.resource_version().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str, version: &str) -> Record {
        Record {
            holder: holder.to_owned(),
            duration: DURATION,
            transitions: 0,
            resource_version: version.to_owned(),
        }
    }

    fn contender() -> Contender {
        Contender::new("me".to_owned())
    }

    #[test]
    fn a_missing_lease_is_made_and_a_free_one_taken() {
        let now = Instant::now();
        assert_eq!(contender().judge(None, now), Step::Create);
        assert_eq!(contender().judge(Some(&held_by("", "1")), now), Step::Take);
    }

    #[test]
    fn a_lease_that_is_renewed_is_never_taken() {
        let start = Instant::now();
        let mut me = contender();
        for renewal in 0..20 {
            let now = start + RETRY_EVERY * renewal;
            let step = me.judge(Some(&held_by("other", &renewal.to_string())), now);
            assert_eq!(step, Step::Wait);
        }
    }

    #[test]
    fn a_silent_lease_is_taken_after_its_duration_by_our_clock() {
        let start = Instant::now();
        let mut me = contender();
        assert_eq!(me.judge(Some(&held_by("other", "1")), start), Step::Wait);
        assert_eq!(
            me.judge(Some(&held_by("other", "1")), start + DURATION),
            Step::Wait
        );
        let later = start + DURATION + Duration::from_millis(1);
        assert_eq!(me.judge(Some(&held_by("other", "1")), later), Step::Take);
    }

    #[test]
    fn the_first_look_at_an_old_lease_counts_from_then() {
        // Whatever time stands in the record, the clock that wrote it may be wrong.
        let now = Instant::now() + Duration::from_hours(1);
        assert_eq!(
            contender().judge(Some(&held_by("other", "1")), now),
            Step::Wait
        );
    }

    #[test]
    fn our_own_lease_is_renewed() {
        let mut me = contender();
        assert_eq!(
            me.judge(Some(&held_by("me", "1")), Instant::now()),
            Step::Renew
        );
        assert_eq!(
            me.judge(Some(&held_by("other", "2")), Instant::now()),
            Step::Wait,
            "it was taken from us"
        );
    }

    #[test]
    fn a_record_is_read_from_the_object() {
        let lease: Lease = serde_json::from_value(serde_json::json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": "collab-operator", "resourceVersion": "7" },
            "spec": { "holderIdentity": "other", "leaseDurationSeconds": 15, "leaseTransitions": 3 },
        }))
        .unwrap();
        assert_eq!(
            record(&lease),
            Record {
                transitions: 3,
                ..held_by("other", "7")
            }
        );
    }
}
