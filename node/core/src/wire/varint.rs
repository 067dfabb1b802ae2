//! The integers, strings and byte arrays of lib0, the encoding below every Yjs format.
//!
//! An unsigned integer has 7 bits in each byte, lowest first, and the top bit set on all but the
//! last. JavaScript has 53 bits of it. Only the shortest form is read: two encodings of one number
//! would be two byte strings with one meaning.

use std::str;

/// Largest integer that is read: the integers that JavaScript has exactly.
pub const VAR_UINT_MAX: u64 = (1 << 53) - 1;

/// Why bytes are not what lib0 would have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The bytes end inside a value: it was cut, or a length in it lies.
    #[error("the bytes end inside a value")]
    Truncated,
    /// An integer has more than 53 bits or is not in its shortest form.
    #[error("an integer is not in the shortest form or has more than 53 bits")]
    Integer,
    /// A string is not UTF-8.
    #[error("a string is not UTF-8")]
    Utf8,
}

/// Reads values from the front of a byte string, without copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What was not read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Whether everything was read.
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Reads one byte.
    ///
    /// # Errors
    /// When nothing is left.
    #[inline]
    pub fn byte(&mut self) -> Result<u8, ReadError> {
        let (&first, rest) = self.rest.split_first().ok_or(ReadError::Truncated)?;
        self.rest = rest;
        Ok(first)
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// When fewer are left.
    #[inline]
    pub fn take(&mut self, len: u64) -> Result<&'a [u8], ReadError> {
        let len = usize::try_from(len).map_err(|_| ReadError::Truncated)?;
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(ReadError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads an unsigned integer of up to 53 bits.
    ///
    /// # Errors
    /// When it is cut, too large or longer than need be.
    #[inline]
    pub fn var_uint(&mut self) -> Result<u64, ReadError> {
        let mut value = 0;
        for shift in (0..56).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                let shortest = byte != 0 || shift == 0;
                return if shortest && value <= VAR_UINT_MAX {
                    Ok(value)
                } else {
                    Err(ReadError::Integer)
                };
            }
        }
        Err(ReadError::Integer)
    }

    /// Reads a signed integer of up to 53 bits: the sign is the second bit of the first byte, so
    /// that there is a `-0`, which is read as 0.
    ///
    /// # Errors
    /// When it is cut, too large or longer than need be.
    #[inline]
    pub fn var_int(&mut self) -> Result<i64, ReadError> {
        let first = self.byte()?;
        let mut value = i64::from(first & 0x3F);
        if first & 0x80 != 0 {
            // The rest is an unsigned integer of its own, shifted by the 6 bits that are read; it is
            // not 0 in the shortest form.
            let high = self.var_uint()?;
            if high == 0 || high > VAR_UINT_MAX >> 6 {
                return Err(ReadError::Integer);
            }
            value |= i64::try_from(high << 6).map_err(|_| ReadError::Integer)?;
        }
        Ok(if first & 0x40 == 0 { value } else { -value })
    }

    /// Reads a byte array: its length, then its bytes.
    ///
    /// # Errors
    /// When it is cut.
    #[inline]
    pub fn var_bytes(&mut self) -> Result<&'a [u8], ReadError> {
        let len = self.var_uint()?;
        self.take(len)
    }

    /// Reads a string: its length in bytes, then UTF-8.
    ///
    /// # Errors
    /// When it is cut or not UTF-8.
    #[inline]
    pub fn var_str(&mut self) -> Result<&'a str, ReadError> {
        str::from_utf8(self.var_bytes()?).map_err(|_| ReadError::Utf8)
    }
}

/// Appends an unsigned integer in its shortest form.
pub fn write_var_uint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7F {
        out.push(0x80 | value.to_le_bytes()[0]);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Appends a byte array: its length, then its bytes.
pub fn write_var_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    write_var_uint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use yrs::encoding::write::Write;

    use super::*;

    #[test]
    fn integers_of_53_bits_are_read() {
        assert_eq!(Reader::new(&[0x7F]).var_uint(), Ok(127));
        assert_eq!(Reader::new(&[0x80, 0x01]).var_uint(), Ok(128));
        let largest = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F];
        assert_eq!(Reader::new(&largest).var_uint(), Ok(VAR_UINT_MAX));
    }

    #[test]
    fn longer_integers_are_refused() {
        let too_large = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x10];
        let too_long = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
        for bytes in [
            &[0x80, 0x00][..],
            &[0xFF, 0x80, 0x00],
            &too_large,
            &too_long,
        ] {
            assert_eq!(
                Reader::new(bytes).var_uint(),
                Err(ReadError::Integer),
                "{bytes:?}"
            );
        }
        for bytes in [&[0x80, 0x00][..], &[0xC1, 0x80, 0x00]] {
            assert_eq!(
                Reader::new(bytes).var_int(),
                Err(ReadError::Integer),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn values_that_are_cut_are_refused() {
        for bytes in [&[][..], &[0x80], &[0xFF, 0xFF]] {
            assert_eq!(
                Reader::new(bytes).var_uint(),
                Err(ReadError::Truncated),
                "{bytes:?}"
            );
            assert_eq!(
                Reader::new(bytes).var_int(),
                Err(ReadError::Truncated),
                "{bytes:?}"
            );
        }
        assert_eq!(
            Reader::new(&[3, b'a', b'b']).var_bytes(),
            Err(ReadError::Truncated)
        );
        let huge = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, b'a'];
        assert_eq!(Reader::new(&huge).var_bytes(), Err(ReadError::Truncated));
    }

    #[test]
    fn strings_are_utf8() {
        assert_eq!(Reader::new(&[2, 0xC3, 0xA4]).var_str(), Ok("ä"));
        assert_eq!(Reader::new(&[1, 0xC3]).var_str(), Err(ReadError::Utf8));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in any::<u64>(), bytes in any::<Vec<u8>>()) {
            // Of every length, not only of 53 bits.
            let value = value & VAR_UINT_MAX >> (value % 53);
            let mut out = Vec::new();
            write_var_uint(&mut out, value);
            write_var_bytes(&mut out, &bytes);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.var_uint(), Ok(value));
            prop_assert_eq!(reader.var_bytes(), Ok(bytes.as_slice()));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn it_is_the_encoding_of_yrs(value in any::<u64>(), signed in any::<i32>(), text in ".*") {
            let value = value & VAR_UINT_MAX >> (value % 53);
            let mut theirs = Vec::new();
            theirs.write_var(value);
            theirs.write_string(&text);
            let mut ours = Vec::new();
            write_var_uint(&mut ours, value);
            write_var_bytes(&mut ours, text.as_bytes());
            prop_assert_eq!(&ours, &theirs);

            theirs.write_var(i64::from(signed));
            let mut reader = Reader::new(&theirs);
            prop_assert_eq!(reader.var_uint(), Ok(value));
            prop_assert_eq!(reader.var_str(), Ok(text.as_str()));
            prop_assert_eq!(reader.var_int(), Ok(i64::from(signed)));
        }
    }
}
