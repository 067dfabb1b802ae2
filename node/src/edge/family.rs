//! What a client is told, and how its family says it.

use std::sync::Arc;

use bytes::Bytes;
use collab_core::wire::hocuspocus::{self, Scope, Status};
use collab_core::wire::relay::UpdateKind;
use collab_core::wire::{y_sweet, y_websocket};

use super::Access;

/// A smaller update is framed for each.
const SHARED_BYTES_MIN: usize = 4096;

/// A family of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Family {
    /// y-websocket 3 and 4. Its own edits come back to a client once they are durable.
    YWebsocket,
    /// y-sweet. It asks for its receipts, and closes a socket that is silent after it asked.
    YSweet,
    /// Hocuspocus 3 and 4. It counts its changes, and a status for each takes one off.
    Hocuspocus {
        /// What stands before each message about this document.
        address: Arc<str>,
    },
}

/// What a client is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told<'a> {
    /// "Send what I lack": a state vector.
    Step1(&'a [u8]),
    /// What the client lacked.
    Step2(&'a [u8]),
    /// An edit; its own one is a receipt.
    Update(&'a [u8]),
    /// Presence.
    Presence(&'a [u8]),
    /// All that it sent before it asked with this payload is durable.
    Saved(&'a [u8]),
    /// What became of one change.
    Status(Status),
    /// It has the document, and may do this with it.
    Granted(Access),
    /// It may not have the document.
    Denied(&'a str),
    /// What the application of another client says, in UTF-8.
    Stateless(&'a [u8]),
    /// Nothing, but that the socket lives.
    Alive,
}

impl Family {
    /// The frame that says it; `None` when the family has no words for it.
    pub(super) fn frame(&self, told: Told<'_>) -> Option<Bytes> {
        match self {
            Self::YWebsocket | Self::YSweet => Some(match told {
                Told::Step1(state_vector) => y_websocket::sync_step1(state_vector),
                Told::Step2(update) => y_websocket::sync_step2(update),
                Told::Update(update) => y_websocket::update(update),
                Told::Presence(payload) => y_websocket::awareness(payload),
                Told::Saved(payload) => y_sweet::saved(payload),
                Told::Denied(reason) => y_websocket::permission_denied(reason),
                Told::Alive => Bytes::from_static(y_websocket::KEEPALIVE),
                Told::Status(_) | Told::Granted(_) | Told::Stateless(_) => return None,
            }),
            Self::Hocuspocus { address } => Some(match told {
                Told::Step1(state_vector) => hocuspocus::sync_step1(address, state_vector),
                Told::Step2(update) => hocuspocus::sync_step2(address, update),
                Told::Update(update) => hocuspocus::update(address, update),
                Told::Presence(payload) => hocuspocus::awareness(address, payload),
                Told::Status(status) => hocuspocus::sync_status(address, status),
                Told::Granted(access) => hocuspocus::authenticated(
                    address,
                    match access {
                        Access::Read => Scope::ReadOnly,
                        Access::Write => Scope::ReadWrite,
                    },
                ),
                Told::Denied(reason) => hocuspocus::permission_denied(address, reason),
                Told::Stateless(payload) => hocuspocus::stateless(address, payload),
                Told::Alive => hocuspocus::awareness(address, &[0]),
                Told::Saved(_) => return None,
            }),
        }
    }
}

/// The frames of one thing that many sockets are told: encoded once for all that take the same bytes.
#[derive(Debug, Default)]
pub(super) struct Frames {
    plain: Option<Bytes>,
    addressed: Option<(Arc<str>, Bytes)>,
}

impl Frames {
    /// As [`Family::frame`], of what is always the same.
    pub(super) fn frame(&mut self, family: &Family, told: Told<'_>) -> Option<Bytes> {
        match (family, &self.plain, &self.addressed) {
            (Family::YWebsocket | Family::YSweet, Some(frame), _) => return Some(frame.clone()),
            (Family::Hocuspocus { address }, _, Some((known, frame))) if known == address => {
                return Some(frame.clone());
            }
            _ => {}
        }
        let frame = family.frame(told)?;
        match family {
            Family::YWebsocket | Family::YSweet => self.plain = Some(frame.clone()),
            Family::Hocuspocus { address } => {
                self.addressed = Some((address.clone(), frame.clone()));
            }
        }
        Some(frame)
    }
}

/// What many sockets are told at once.
pub(super) struct Shared<'a> {
    told: Told<'a>,
    frames: Frames,
}

impl<'a> Shared<'a> {
    pub(super) fn new(told: Told<'a>) -> Self {
        let frames = Frames::default();
        Self { told, frames }
    }

    /// As [`Family::frame`].
    pub(super) fn frame(&mut self, family: &Family) -> Option<Bytes> {
        self.frames.frame(family, self.told)
    }
}

/// Updates that newcomers are sent one after the other, each framed once as long as it is here.
#[derive(Debug, Default)]
pub(super) struct Recent(Vec<Framed>);

#[derive(Debug)]
struct Framed {
    /// Held, so that nothing else comes to lie where it is.
    update: Bytes,
    is_step2: bool,
    frames: Frames,
}

impl Recent {
    /// As [`Family::frame`]. The same bytes are told by what lies at the same place.
    pub(super) fn frame(
        &mut self,
        family: &Family,
        update: &Bytes,
        kind: UpdateKind,
    ) -> Option<Bytes> {
        let (told, is_step2) = match kind {
            UpdateKind::Step2 => (Told::Step2(update), true),
            UpdateKind::Update => (Told::Update(update), false),
        };
        if update.len() < SHARED_BYTES_MIN {
            return family.frame(told);
        }
        let same = |framed: &Framed| {
            let (one, other) = (&framed.update, update);
            (one.as_ptr(), one.len(), framed.is_step2) == (other.as_ptr(), other.len(), is_step2)
        };
        let known = self.0.iter().position(same).unwrap_or_else(|| {
            self.0.push(Framed {
                update: update.clone(),
                is_step2,
                frames: Frames::default(),
            });
            self.0.len() - 1
        });
        self.0[known].frames.frame(family, told)
    }

    /// Lets go of all.
    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_encoded_once_for_all_who_take_the_same_bytes() {
        let addressed = |address: &str| Family::Hocuspocus {
            address: address.into(),
        };
        let mut shared = Shared::new(Told::Update(&[1, 2, 3]));
        let plain = shared.frame(&Family::YWebsocket).unwrap();
        let first = shared.frame(&addressed("a")).unwrap();
        assert_eq!(
            plain.as_ptr(),
            shared.frame(&Family::YSweet).unwrap().as_ptr()
        );
        assert_eq!(
            first.as_ptr(),
            shared.frame(&addressed("a")).unwrap().as_ptr()
        );
        assert_eq!(
            shared.frame(&addressed("a\0session")).unwrap(),
            hocuspocus::update("a\0session", &[1, 2, 3])
        );
        assert_eq!(plain, y_websocket::update(&[1, 2, 3]));
        assert_eq!(first, hocuspocus::update("a", &[1, 2, 3]));
    }

    #[test]
    fn an_update_for_several_newcomers_is_framed_once_as_what_it_is() {
        let mut recent = Recent::default();
        let update = Bytes::from(vec![1; SHARED_BYTES_MIN]);
        let mut frame =
            |update: &Bytes, kind| recent.frame(&Family::YWebsocket, update, kind).unwrap();
        let first = frame(&update, UpdateKind::Step2);
        assert_eq!(first, y_websocket::sync_step2(&update));
        let again = frame(&update.clone(), UpdateKind::Step2);
        assert_eq!(first.as_ptr(), again.as_ptr());
        let part = frame(&update, UpdateKind::Update);
        assert_eq!(part, y_websocket::update(&update));
        let other = frame(&Bytes::from(vec![2; SHARED_BYTES_MIN]), UpdateKind::Step2);
        assert_ne!(first, other);
    }

    #[test]
    fn a_family_that_has_no_words_for_it_is_told_nothing() {
        let mut shared = Shared::new(Told::Stateless(b"ring"));
        assert_eq!(shared.frame(&Family::YSweet), None);
        assert_eq!(Family::YWebsocket.frame(Told::Status(Status::Saved)), None);
    }
}
