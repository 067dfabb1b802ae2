//! Yjs V1 updates written by hand: what a writer types, and the long past of a large document.
//!
//! The load generator must cost less than any server, so it never builds a document. A test applies
//! what is written here with `yrs`.

#![allow(clippy::cast_possible_truncation, reason = "there are 20 authors")]

use collab_core::wire::varint::write_var_uint;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Characters of one edit.
pub(crate) const EDIT_CHARS: u32 = 4;
/// Name of the shared text.
const TEXT: &[u8] = b"quill";
const STRING: u8 = 4;
const HAS_ORIGIN: u8 = 0x80;
const HAS_RIGHT_ORIGIN: u8 = 0x40;

/// Writes the edit at `clock` of a writer that types at the end of its own text: [`EDIT_CHARS`] characters.
pub(crate) fn write_edit(update: &mut Vec<u8>, client: u64, clock: u32) {
    update.extend_from_slice(&[1, 1]);
    write_var_uint(update, client);
    write_var_uint(update, clock.into());
    write_struct(
        update,
        clock.checked_sub(1).map(|last| (client, last)),
        None,
        b"word",
    );
    update.push(0);
}

/// Reads what [`write_edit`] wrote: whose it is and the clock behind it. `None` for anything else.
pub(crate) fn read_edit(update: &[u8]) -> Option<(u64, u32)> {
    // More text would be the state of a document.
    let rest = update.strip_prefix(&[1, 1])?;
    let _ = update.strip_suffix(b"\x04word\0")?;
    let (client, rest) = var_uint(rest)?;
    let (clock, _) = var_uint(rest)?;
    Some((client, u32::try_from(clock).ok()? + EDIT_CHARS))
}

/// Reads one unsigned varint.
pub(crate) fn var_uint(mut bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (mut value, mut shift) = (0_u64, 0);
    loop {
        let (first, rest) = bytes.split_first()?;
        value |= u64::from(first & 0x7f) << shift;
        bytes = rest;
        if first & 0x80 == 0 {
            return Some((value, bytes));
        }
        shift += 7;
        if 63 < shift {
            return None;
        }
    }
}

fn write_struct(
    update: &mut Vec<u8>,
    origin: Option<(u64, u32)>,
    right: Option<(u64, u32)>,
    text: &[u8],
) {
    let flag = |there: bool, flag: u8| if there { flag } else { 0 };
    update.push(
        STRING | flag(origin.is_some(), HAS_ORIGIN) | flag(right.is_some(), HAS_RIGHT_ORIGIN),
    );
    for (client, clock) in origin.into_iter().chain(right) {
        write_var_uint(update, client);
        write_var_uint(update, clock.into());
    }
    if origin.is_none() && right.is_none() {
        update.push(1);
        write_bytes(update, TEXT);
    }
    write_bytes(update, text);
}

fn write_bytes(update: &mut Vec<u8>, bytes: &[u8]) {
    write_var_uint(update, bytes.len() as u64);
    update.extend_from_slice(bytes);
}

/// A stretch of text that one author typed.
struct Run {
    client: u64,
    clock: u32,
    len: u32,
    /// The run behind it in the text.
    next: Option<usize>,
}

/// The past of a document: 20 authors who type, jump and delete, as updates of about `chunk` bytes, `total` bytes in all.
pub(crate) fn history(total: usize, chunk: usize) -> Vec<Vec<u8>> {
    const AUTHORS: u64 = 20;
    let mut random = StdRng::seed_from_u64(1);
    let mut runs = Vec::<Run>::new();
    let mut clocks = [0_u32; AUTHORS as usize];
    let mut last_runs = [None; AUTHORS as usize];
    let (mut updates, mut bytes) = (Vec::new(), 0);
    while bytes < total {
        // Per author the clock at which its section begins, its structs and their number.
        let mut sections: Vec<(u32, Vec<u8>, u64)> =
            clocks.iter().map(|clock| (*clock, Vec::new(), 0)).collect();
        let mut deletes = vec![Vec::<(u32, u32)>::new(); AUTHORS as usize];
        let mut size = 0;
        while size < chunk {
            let author = random.random_range(0..AUTHORS) as usize;
            // Mostly typing goes on where it was, now and then elsewhere.
            let after = if random.random_bool(0.15) || last_runs[author].is_none() {
                (!runs.is_empty()).then(|| random.random_range(0..runs.len()))
            } else {
                last_runs[author]
            };
            if random.random_bool(0.1)
                && let Some(run) = after
            {
                let Run {
                    client, clock, len, ..
                } = runs[run];
                deletes[client as usize - 1].push((clock, len.min(3)));
                continue;
            }
            let client = author as u64 + 1;
            let len = random.random_range(1..=12_u32);
            let text: Vec<u8> = (0..len).map(|_| random.random_range(b'a'..=b'z')).collect();
            let next = after.and_then(|after| runs[after].next);
            let id_of = |run: usize| (runs[run].client, runs[run].clock);
            let origin =
                after.map(|after| (runs[after].client, runs[after].clock + runs[after].len - 1));
            let (_, section, structs) = &mut sections[author];
            let before = section.len();
            write_struct(section, origin, next.map(id_of), &text);
            *structs += 1;
            size += section.len() - before;
            runs.push(Run {
                client,
                clock: clocks[author],
                len,
                next,
            });
            let this = runs.len() - 1;
            if let Some(after) = after {
                runs[after].next = Some(this);
            }
            clocks[author] += len;
            last_runs[author] = Some(this);
        }
        let update = encode(&sections, &mut deletes);
        bytes += update.len();
        updates.push(update);
    }
    updates
}

fn encode(sections: &[(u32, Vec<u8>, u64)], deletes: &mut [Vec<(u32, u32)>]) -> Vec<u8> {
    let mut update = Vec::new();
    let written = sections
        .iter()
        .filter(|(_, _, structs)| 0 < *structs)
        .count();
    write_var_uint(&mut update, written as u64);
    for (author, (clock, bytes, structs)) in sections.iter().enumerate().rev() {
        if 0 < *structs {
            write_var_uint(&mut update, *structs);
            write_var_uint(&mut update, author as u64 + 1);
            write_var_uint(&mut update, (*clock).into());
            update.extend_from_slice(bytes);
        }
    }
    write_var_uint(
        &mut update,
        deletes.iter().filter(|ranges| !ranges.is_empty()).count() as u64,
    );
    for (author, ranges) in deletes
        .iter_mut()
        .enumerate()
        .filter(|(_, ranges)| !ranges.is_empty())
    {
        ranges.sort_unstable();
        ranges.dedup_by_key(|(clock, _)| *clock);
        write_var_uint(&mut update, author as u64 + 1);
        write_var_uint(&mut update, ranges.len() as u64);
        for (clock, len) in ranges {
            write_var_uint(&mut update, (*clock).into());
            write_var_uint(&mut update, (*len).into());
        }
    }
    update
}

/// What was written is what Yjs would have written: `yrs` takes all of it and waits for nothing.
///
/// # Panics
/// When it is not.
pub(crate) fn check() {
    use yrs::updates::decoder::Decode;
    use yrs::{ReadTxn, Transact, Update};
    let doc = collab_core::replica::new_doc();
    let mut edits = Vec::new();
    for number in 0..3 {
        let mut edit = Vec::new();
        write_edit(&mut edit, 77, number * EDIT_CHARS);
        assert_eq!(read_edit(&edit), Some((77, (number + 1) * EDIT_CHARS)));
        assert_eq!(
            read_edit(&[
                1, 1, 77, 0, 4, 1, 1, b't', 8, b'w', b'o', b'r', b'd', b'w', b'o', b'r', b'd', 0
            ]),
            None
        );
        edits.push(edit);
    }
    for update in history(200_000, 32_000).iter().chain(&edits) {
        collab_core::scan::scan_update(update).expect("the scanner takes it");
        let update = Update::decode_v1(update).expect("yrs reads it");
        doc.transact_mut()
            .apply_update(update)
            .expect("yrs applies it");
    }
    let txn = doc.transact();
    assert!(!txn.has_missing_updates());
    let text = yrs::GetString::get_string(&txn.get_text("quill").expect("it is a text"), &txn);
    assert!(
        text.ends_with("wordwordword") || text.starts_with("wordwordword"),
        "the edits stand together"
    );
}
