//! The key of client tokens.

use collab_crds::names::{Component, Names};

use crate::model::Credential;

/// Draws the Secret that is used unless the spec names one.
pub fn draw(names: Names<'_>, random: &mut impl rand::Rng) -> Credential {
    Credential {
        name: names.auth_secret(),
        stored: false,
        keeps_data: true,
        component: Component::Node,
        data: [("secret".to_owned(), super::password(random))].into(),
    }
}
