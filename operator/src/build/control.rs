//! The bearer token of the control API and of peers.

use collab_crds::names::{Component, Names};

use crate::model::Credential;

/// Draws the Secret.
pub fn draw(names: Names<'_>, random: &mut impl rand::Rng) -> Credential {
    Credential {
        name: names.control_secret(),
        stored: false,
        keeps_data: false,
        component: Component::Node,
        data: [("token".to_owned(), super::password(random))].into(),
    }
}
