//! Seeded choices, and what they do to bytes.

use std::collections::BTreeMap;

use collab_core::wire::varint::{write_var_bytes, write_var_uint};

use super::sessions::Base;

/// Xorshift: a seed gives the same choices everywhere and always.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from((self.next() >> 11) % end as u64).expect("smaller than a usize")
    }

    pub(super) fn pick<'t, T>(&mut self, of: &'t [T]) -> &'t T {
        &of[self.below(of.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    /// Changes up to four places: a bit, a byte, a piece of itself or of another.
    pub(super) fn mutate(&mut self, bytes: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
        /// Kinds, flags and small numbers.
        const TELLING: &[u8] = &[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0x20, 0x44, 0x7F, 0x80, 0x84, 0x87, 0x88, 0xA8, 0xC1,
            0xC4, 0xC7, 0xE8, 0xFF, 102, 117, 118, 119, 126,
        ];
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(3) {
            if bytes.is_empty() {
                bytes.push(*self.pick(TELLING));
            }
            let place = self.below(bytes.len());
            match self.below(10) {
                0 => bytes[place] ^= 1 << self.below(8),
                1 => bytes[place] = self.byte(),
                2 | 3 => bytes[place] = *self.pick(TELLING),
                4 => bytes[place] = bytes[place].wrapping_add(1),
                5 => bytes[place] = bytes[place].wrapping_sub(1),
                6 => bytes.insert(place, *self.pick(TELLING)),
                7 => {
                    bytes.remove(place);
                }
                8 => {
                    // A number of any size where there was one.
                    let bits = self.below(64);
                    let mut number = Vec::new();
                    write_var_uint(&mut number, self.next() >> bits);
                    bytes.splice(place..=place, number);
                }
                _ => {
                    let from = if self.below(2) == 0 {
                        bytes.clone()
                    } else {
                        self.pick(others).clone()
                    };
                    if from.is_empty() {
                        continue;
                    }
                    let start = self.below(from.len());
                    let end = (start + 1 + self.below(12)).min(from.len());
                    let until = if self.below(2) == 0 {
                        place
                    } else {
                        (place + end - start).min(bytes.len())
                    };
                    bytes.splice(place..until, from[start..end].iter().copied());
                }
            }
        }
        bytes
    }

    /// An update of well-formed structs for a document, with whatever references and content.
    pub(super) fn compose(&mut self, base: &Base) -> Vec<u8> {
        let mut known: BTreeMap<u64, u32> = base.clocks.clone();
        let mut client = 7;
        if self.below(4) > 0 && !known.is_empty() {
            client = self.id(&known).0;
        }
        let start = known.get(&client).copied().unwrap_or_default();
        let structs = 1 + self.below(4);
        let mut update = vec![1];
        write_var_uint(&mut update, structs as u64);
        write_var_uint(&mut update, client);
        write_var_uint(&mut update, start.into());
        for _ in 0..structs {
            let len = self.compose_struct(&known, &mut update);
            *known.entry(client).or_default() += len;
        }
        if self.below(2) == 0 {
            update.push(0);
        } else {
            let (client, start) = self.id(&known);
            update.push(1);
            write_var_uint(&mut update, client);
            update.push(1);
            write_var_uint(&mut update, start.into());
            let len = 1 + self.below((known[&client] - start) as usize);
            write_var_uint(&mut update, len as u64);
        }
        update
    }

    /// Appends a struct and gives its length.
    fn compose_struct(&mut self, known: &BTreeMap<u64, u32>, update: &mut Vec<u8>) -> u32 {
        const CONTENTS: &[(u32, &[u8])] = &[
            (2, &[1, 2]),
            (1, &[3, 1, 9]),
            (1, &[4, 1, b'x']),
            (3, &[4, 3, b'x', b'y', b'z']),
            (2, &[4, 4, 0xF0, 0x9F, 0x98, 0x80]),
            (1, &[5, 2, b'{', b'}']),
            (1, &[6, 1, b'b', 4, b't', b'r', b'u', b'e']),
            (1, &[6, 1, b'b', 4, b'n', b'u', b'l', b'l']),
            (1, &[7, 0]),
            (1, &[7, 1]),
            (1, &[7, 2]),
            (1, &[7, 3, 1, b'p']),
            (1, &[7, 6]),
            (1, &[8, 1, 126]),
            (2, &[8, 2, 125, 1, 120]),
            (1, &[9, 1, b'g', 118, 0]),
        ];
        if self.below(10) == 0 {
            update.extend([0, 1]); // collected
            return 1;
        }
        let (len, content) = *self.pick(CONTENTS);
        let origins = if known.is_empty() {
            0
        } else {
            *self.pick(&[0, 0x80, 0x40, 0xC0])
        };
        let key = *self.pick(&[0, 0x20]);
        update.push(content[0] | origins | key);
        for _ in 0..u8::count_ones(origins) {
            self.compose_id(known, update);
        }
        if origins == 0 {
            if known.is_empty() || self.below(2) == 0 {
                update.push(1);
                let root = self.pick(&["text", "map", "array", "xml", "new"]);
                write_var_bytes(update, root.as_bytes());
            } else {
                update.push(0);
                self.compose_id(known, update);
            }
            if key != 0 {
                write_var_bytes(update, self.pick(&["a", "b", "nested"]).as_bytes());
            }
        }
        update.extend(&content[1..]);
        len
    }

    fn compose_id(&mut self, known: &BTreeMap<u64, u32>, update: &mut Vec<u8>) {
        let (client, clock) = self.id(known);
        write_var_uint(update, client);
        write_var_uint(update, clock.into());
    }

    /// Any known clock, the last of its client more often.
    fn id(&mut self, known: &BTreeMap<u64, u32>) -> (u64, u32) {
        let clients: Vec<_> = known.iter().collect();
        let (client, end) = *self.pick(&clients);
        let any = u32::try_from(self.below(*end as usize)).expect("less than a clock");
        (*client, if self.below(3) == 0 { end - 1 } else { any })
    }
}
