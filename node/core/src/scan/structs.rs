//! The structs of a section, one after the other.
//!
//! ```text
//! info, then   GC (0) and Skip (10):  length
//!              item (1 to 9):         origin?, right origin?,
//!                                     without origins: 1 + root name or 0 + id of the parent, key?
//!                                     content
//! ```
//!
//! The low five bits of `info` are the kind, which for an item is its content; the high bits tell
//! which of the optional fields there are (128 origin, 64 right origin, 32 key). An id is a client
//! and a clock. Lengths of content are clocks: each UTF-16 unit of a text, each value of an array,
//! and one for everything else.

use std::borrow::Cow;

use yrs::Any;

use super::{ScanError, Summary};
use crate::limits::{CLOCK_END_MAX, UPDATE_DEPTH_MAX};
use crate::wire::json;
use crate::wire::varint::{ReadError, Reader, write_var_bytes, write_var_uint};

pub(super) const GC: u8 = 0;
pub(super) const DELETED: u8 = 1;
pub(super) const STRING: u8 = 4;
const EMBED: u8 = 5;
const FORMAT: u8 = 6;
const TYPE: u8 = 7;
const ANY: u8 = 8;
pub(super) const SKIP: u8 = 10;
const KIND: u8 = 0b0001_1111;
const HAS_ORIGIN: u8 = 0b1000_0000;
const HAS_RIGHT_ORIGIN: u8 = 0b0100_0000;
const HAS_KEY: u8 = 0b0010_0000;

/// A kind with these bits is no UTF-16 unit of a whole character.
pub(super) const KIND_MARKS: u16 = 0xD800;

/// Map in the encoding of JSON-like values.
const ANY_MAP: u8 = 118;

/// A clock of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    /// The client.
    pub client: u64,
    /// Its clock.
    pub clock: u32,
}

/// What the later readings need to know of a struct.
#[derive(Debug, Clone, Copy)]
pub(super) struct Struct<'a> {
    /// Clock behind its last.
    pub(super) end: u32,
    pub(super) place: Place<'a>,
    pub(super) content: Content,
    /// What it is, as in its first byte.
    pub(super) kind: u8,
    /// The bytes of its content; none for what is only a length.
    pub(super) body: &'a [u8],
}

/// Where a struct belongs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// It only stands for clocks that were left out.
    Skipped,
    /// It was collected, with all that was inside it.
    Collected,
    /// In a type that the document has by name.
    Root {
        name: &'a [u8],
        key: Option<&'a [u8]>,
    },
    /// In the shared type that this item holds.
    Inside { parent: Id, key: Option<&'a [u8]> },
    /// In the type of its origins, of which there is one at least.
    Beside(Option<Id>, Option<Id>),
}

/// What an item holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A shared type.
    Type,
    /// Something that was deleted, maybe a shared type.
    Deleted,
    /// Text, or what stands between text: embeds and formats.
    Text,
    /// Any other value.
    Value,
}

impl Place<'_> {
    /// What has to be there before it.
    pub(super) fn refers_to(self) -> impl Iterator<Item = Id> {
        let (first, second) = match self {
            Self::Skipped | Self::Collected | Self::Root { .. } => (None, None),
            Self::Inside { parent, .. } => (Some(parent), None),
            Self::Beside(origin, right_origin) => (origin, right_origin),
        };
        first.into_iter().chain(second)
    }
}

/// The first reading of an update checks everything, the later ones only find their way.
pub(super) enum Pass<'s> {
    Check(&'s mut Summary),
    Walk,
}

/// The rest of an update.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    reader: Reader<'a>,
    bytes: usize,
}

impl<'a> Source<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            reader: Reader::new(bytes),
            bytes: bytes.len(),
        }
    }

    /// How many bytes were read.
    pub(super) fn position(&self) -> usize {
        self.bytes - self.reader.rest().len()
    }

    /// What was read since `self`, to where `end` stands.
    pub(super) fn up_to(&self, end: &Self) -> &'a [u8] {
        let rest = self.reader.rest();
        &rest[..rest.len() - end.reader.rest().len()]
    }

    pub(super) fn malformed(&self, what: &'static str) -> ScanError {
        ScanError::Malformed {
            at: self.position(),
            what,
        }
    }

    fn unsupported(&self, what: &'static str) -> ScanError {
        ScanError::Unsupported {
            at: self.position(),
            what,
        }
    }

    fn read<T>(
        &mut self,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, ReadError>,
    ) -> Result<T, ScanError> {
        read(&mut self.reader).map_err(|error| {
            self.malformed(match error {
                ReadError::Truncated => "it ends inside a value",
                ReadError::Integer => "an integer that is too long or too large",
                ReadError::Utf8 => "text that is not UTF-8",
            })
        })
    }

    pub(super) fn end(&self) -> Result<(), ScanError> {
        if self.reader.is_empty() {
            Ok(())
        } else {
            Err(self.malformed("bytes behind its end"))
        }
    }

    /// Reads how many of something follow, of which each takes at least `bytes_min`.
    pub(super) fn count(&mut self, bytes_min: usize) -> Result<u64, ScanError> {
        let count = self.read(Reader::var_uint)?;
        if count > (self.reader.rest().len() / bytes_min) as u64 {
            return Err(self.malformed("a count of more than there are bytes for"));
        }
        Ok(count)
    }

    pub(super) fn client(&mut self) -> Result<u64, ScanError> {
        self.read(Reader::var_uint)
    }

    pub(super) fn clock(&mut self) -> Result<u32, ScanError> {
        let clock = self.read(Reader::var_uint)?;
        self.checked_clock(clock)
    }

    fn checked_clock(&self, clock: u64) -> Result<u32, ScanError> {
        let in_range = clock < CLOCK_END_MAX;
        u32::try_from(clock)
            .ok()
            .filter(|_| in_range)
            .ok_or_else(|| self.malformed("a clock of 2^31 or more"))
    }

    pub(super) fn id(&mut self) -> Result<Id, ScanError> {
        Ok(Id {
            client: self.client()?,
            clock: self.clock()?,
        })
    }

    /// Reads a length and gives the clock where what starts at `start` ends.
    pub(super) fn end_of(&mut self, start: u32) -> Result<u32, ScanError> {
        let len = self.read(Reader::var_uint)?;
        self.clock_behind(start, len)
    }

    fn clock_behind(&self, start: u32, len: u64) -> Result<u32, ScanError> {
        if len == 0 {
            return Err(self.malformed("a length of 0"));
        }
        self.checked_clock(u64::from(start).saturating_add(len))
    }

    /// Reads the struct at `id`.
    pub(super) fn read_struct(
        &mut self,
        id: Id,
        pass: &mut Pass<'_>,
    ) -> Result<Struct<'a>, ScanError> {
        let info = self.read(Reader::byte)?;
        match info & KIND {
            GC | SKIP if info != info & KIND => {
                Err(self.malformed("a placeholder with flags of an item"))
            }
            GC => {
                let end = self.end_of(id.clock)?;
                Ok(Struct {
                    end,
                    place: Place::Collected,
                    content: Content::Deleted,
                    kind: GC,
                    body: &[],
                })
            }
            SKIP => {
                if let Pass::Check(summary) = pass {
                    summary.skips += 1;
                }
                let end = self.end_of(id.clock)?;
                Ok(Struct {
                    end,
                    place: Place::Skipped,
                    content: Content::Deleted,
                    kind: SKIP,
                    body: &[],
                })
            }
            kind => {
                let place = self.read_place(info, pass)?;
                let to_itself = |to: Id| to.client == id.client && to.clock >= id.clock;
                if place.refers_to().any(to_itself) {
                    return Err(self.malformed("a struct that refers to itself or what follows it"));
                }
                let start = *self;
                let len = self.read_content(kind, pass)?;
                let body = start.up_to(self);
                let end = self.clock_behind(id.clock, len)?;
                let content = match kind {
                    DELETED => Content::Deleted,
                    TYPE => Content::Type,
                    STRING | EMBED | FORMAT => Content::Text,
                    _ => Content::Value,
                };
                Ok(Struct {
                    end,
                    place,
                    content,
                    kind,
                    body,
                })
            }
        }
    }

    fn read_place(&mut self, info: u8, pass: &Pass<'_>) -> Result<Place<'a>, ScanError> {
        if info & (HAS_ORIGIN | HAS_RIGHT_ORIGIN) != 0 {
            let origin = if info & HAS_ORIGIN == 0 {
                None
            } else {
                Some(self.id()?)
            };
            let right_origin = if info & HAS_RIGHT_ORIGIN == 0 {
                None
            } else {
                Some(self.id()?)
            };
            if origin == right_origin {
                return Err(self.malformed("an item on both sides of another"));
            }
            return Ok(Place::Beside(origin, right_origin));
        }
        let mut place = match self.read(Reader::var_uint)? {
            0 => Place::Inside {
                parent: self.id()?,
                key: None,
            },
            1 => Place::Root {
                name: self.text(pass)?,
                key: None,
            },
            _ => return Err(self.malformed("a parent of unknown kind")),
        };
        if info & HAS_KEY != 0
            && let Place::Inside { key, .. } | Place::Root { key, .. } = &mut place
        {
            *key = Some(self.text(pass)?);
        }
        Ok(place)
    }

    /// Reads the content of an item and gives its length in clocks.
    fn read_content(&mut self, kind: u8, pass: &mut Pass<'_>) -> Result<u64, ScanError> {
        match kind {
            DELETED => return self.read(Reader::var_uint),
            // JSON, replaced by Any before Yjs 13.0. `yrs` reads one string too many.
            2 => return Err(self.unsupported("content of an obsolete kind (JSON)")),
            // Binary
            3 => {
                self.read(Reader::var_bytes)?;
            }
            STRING => return Ok(utf16_len(self.text(pass)?)),
            EMBED => self.json(pass)?,
            FORMAT => {
                self.text(pass)?;
                self.json(pass)?;
            }
            TYPE => {
                if let Pass::Check(summary) = pass {
                    summary.types += 1;
                }
                match self.read(Reader::byte)? {
                    // Array, Map, Text, XmlFragment, XmlText
                    0 | 1 | 2 | 4 | 6 => {}
                    // XmlElement with its name
                    3 => {
                        self.text(pass)?;
                    }
                    // `yrs` reads and writes it without its name.
                    5 => return Err(self.unsupported("an XML hook")),
                    7 => return Err(self.unsupported("a weak link")),
                    _ => return Err(self.malformed("a shared type of unknown kind")),
                }
            }
            ANY => {
                let count = self.count(1)?;
                for _ in 0..count {
                    self.value(0, pass)?;
                }
                return Ok(count);
            }
            // Doc, with its options in a map, without which Yjs fails
            9 => {
                if let Pass::Check(summary) = pass {
                    summary.subdocuments += 1;
                }
                self.text(pass)?;
                if self.reader.rest().first() != Some(&ANY_MAP) {
                    return Err(self.malformed("a subdocument without options"));
                }
                self.value(0, pass)?;
            }
            _ => return Err(self.malformed("content of unknown kind")),
        }
        Ok(1)
    }

    /// Reads a JSON-like value inside `depth` others.
    fn value(&mut self, depth: usize, pass: &mut Pass<'_>) -> Result<(), ScanError> {
        if let Pass::Check(summary) = pass {
            summary.values += 1;
        }
        let kind = self.read(Reader::byte)?;
        match kind {
            // undefined, null, true, false
            127 | 126 | 121 | 120 => {}
            // integer
            125 => {
                self.read(Reader::var_int)?;
            }
            // 32-bit float
            124 => {
                self.read(|reader| reader.take(4))?;
            }
            // 64-bit float, bigint
            123 | 122 => {
                self.read(|reader| reader.take(8))?;
            }
            119 => {
                self.text(pass)?;
            }
            ANY_MAP | 117 => {
                if depth == UPDATE_DEPTH_MAX {
                    return Err(self.malformed("values nested too deep"));
                }
                let is_map = kind == ANY_MAP;
                let bytes_min = if is_map { 2 } else { 1 };
                for _ in 0..self.count(bytes_min)? {
                    if is_map {
                        self.text(pass)?;
                    }
                    self.value(depth + 1, pass)?;
                }
            }
            // bytes
            116 => {
                self.read(Reader::var_bytes)?;
            }
            _ => return Err(self.malformed("a value of unknown kind")),
        }
        Ok(())
    }

    /// Reads the struct at `id` and writes what of it starts at `from`, as Yjs writes it: beside what
    /// is cut off. There has to be something on both sides of the cut.
    pub(super) fn cut_struct(
        &mut self,
        id: Id,
        from: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), ScanError> {
        let cut_off = u64::from(from - id.clock);
        let info = self.read(Reader::byte)?;
        let kind = info & KIND;
        if kind == GC {
            let len = self.read(Reader::var_uint)?;
            out.push(GC);
            write_var_uint(out, len - cut_off);
            return Ok(());
        }
        let right_origin = match self.read_place(info, &Pass::Walk)? {
            Place::Beside(_, right_origin) => right_origin,
            _ => None,
        };
        out.push(info | HAS_ORIGIN);
        let origin = Id {
            client: id.client,
            clock: from - 1,
        };
        for Id { client, clock } in [Some(origin), right_origin].into_iter().flatten() {
            write_var_uint(out, client);
            write_var_uint(out, clock.into());
        }
        match kind {
            DELETED => {
                let len = self.read(Reader::var_uint)?;
                write_var_uint(out, len - cut_off);
            }
            STRING => {
                let rest = cut_text(self.read(Reader::var_str)?, cut_off);
                write_var_bytes(out, rest.as_bytes());
            }
            ANY => {
                let count = self.read(Reader::var_uint)?;
                for _ in 0..cut_off {
                    self.value(0, &mut Pass::Walk)?;
                }
                write_var_uint(out, count - cut_off);
                let kept = *self;
                for _ in cut_off..count {
                    self.value(0, &mut Pass::Walk)?;
                }
                out.extend_from_slice(kept.up_to(self));
            }
            _ => return Err(self.malformed("content that is one")),
        }
        Ok(())
    }

    fn text(&mut self, pass: &Pass<'_>) -> Result<&'a [u8], ScanError> {
        match pass {
            Pass::Check(_) => self.read(|reader| reader.var_str().map(str::as_bytes)),
            Pass::Walk => self.read(Reader::var_bytes),
        }
    }

    /// Reads JSON in a string, which has to be fit for `yrs` too: it keeps it parsed.
    fn json(&mut self, pass: &Pass<'_>) -> Result<(), ScanError> {
        if matches!(pass, Pass::Walk) {
            self.read(Reader::var_bytes)?;
            return Ok(());
        }
        let text = self.read(Reader::var_str)?;
        if !json::is_json(text) {
            return Err(self.malformed("an embed or format that is not JSON, or nested too deep"));
        }
        match Any::from_json(text) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.unsupported(
                "an embed or format with half a surrogate pair or too large a number",
            )),
        }
    }
}

/// Text without its first UTF-16 units. Of a character that is cut apart stays the replacement
/// character, as with Yjs.
fn cut_text(text: &str, units: u64) -> Cow<'_, str> {
    let mut before = 0;
    for (at, character) in text.char_indices() {
        if before == units {
            return Cow::Borrowed(&text[at..]);
        }
        before += character.len_utf16() as u64;
        if before > units {
            let rest = &text[at + character.len_utf8()..];
            return Cow::Owned(format!("{}{rest}", char::REPLACEMENT_CHARACTER));
        }
    }
    Cow::Borrowed("")
}

/// Length in UTF-16 units, of UTF-8: one for each character, two for those of four bytes.
fn utf16_len(text: &[u8]) -> u64 {
    let units = |byte: &u8| u64::from(*byte & 0xC0 != 0x80) + u64::from(*byte >= 0xF0);
    text.iter().map(units).sum()
}
