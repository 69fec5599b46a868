//! Bounded access to untrusted bytes.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::error::{Problem, Result, Thing};

/// Length as u64. A slice is never longer than `isize::MAX` bytes.
pub(crate) fn len<T>(slice: &[T]) -> u64 {
    u64::try_from(slice.len()).unwrap_or(u64::MAX)
}

/// `size` bytes at `offset`.
pub(crate) fn range<'a>(
    bytes: &'a [u8],
    thing: Thing,
    field: &'static str,
    offset: u64,
    size: u64,
) -> Result<&'a [u8]> {
    let Some(end) = offset.checked_add(size) else {
        return Err(thing.error(field, offset, Problem::Overflow));
    };
    let found = match (usize::try_from(offset), usize::try_from(end)) {
        (Ok(offset), Ok(end)) => bytes.get(offset..end),
        _ => None,
    };
    found.ok_or_else(|| thing.error(field, offset, Problem::Truncated { need: end, have: len(bytes) }))
}

/// The struct at `offset`.
pub(crate) fn read<'a, T>(bytes: &'a [u8], thing: Thing, field: &'static str, offset: u64) -> Result<&'a T>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let size = u64::try_from(size_of::<T>()).unwrap_or(u64::MAX);
    let found = range(bytes, thing, field, offset, size)?;
    Ok(T::ref_from_bytes(found).expect("the range has the size of the struct, which needs no alignment"))
}

/// `count` structs at `offset`.
pub(crate) fn slice<'a, T>(
    bytes: &'a [u8],
    thing: Thing,
    field: &'static str,
    offset: u64,
    count: u64,
) -> Result<&'a [T]>
where
    T: FromBytes + Immutable + Unaligned,
    [T]: KnownLayout<PointerMetadata = usize>,
{
    let size = u64::try_from(size_of::<T>()).unwrap_or(u64::MAX);
    let Some(size) = size.checked_mul(count) else {
        return Err(thing.error(field, offset, Problem::Overflow));
    };
    let found = range(bytes, thing, field, offset, size)?;
    Ok(<[T]>::ref_from_bytes(found).expect("the range has a multiple of the struct's size"))
}

/// An index as u64, for messages and offsets.
pub(crate) fn index(index: usize) -> u64 {
    u64::try_from(index).unwrap_or(u64::MAX)
}
