//! A bootstrap written as its rows that are not zero: images are mostly zeros, and so each mutation hits something.

/// Bytes of a row of the image.
const ROW: usize = 16;

/// The image: the number of its rows (u16), then for each row that is not zero its number (u16) and its 16 bytes.
/// Numbers are little-endian; rows outside of the image are left out.
#[must_use]
pub fn expand(data: &[u8]) -> Vec<u8> {
    let Some((rows, data)) = data.split_first_chunk::<2>() else { return Vec::new() };
    let mut image = vec![0; usize::from(u16::from_le_bytes(*rows)) * ROW];
    for row in data.chunks_exact(2 + ROW) {
        let (number, bytes) = row.split_at(2);
        let at = usize::from(u16::from_le_bytes([number[0], number[1]])) * ROW;
        if let Some(place) = image.get_mut(at..at + ROW) {
            place.copy_from_slice(bytes);
        }
    }
    image
}

/// The inverse of [`expand`] for images of whole rows.
#[must_use]
pub fn compact(image: &[u8]) -> Vec<u8> {
    let rows = u16::try_from(image.len() / ROW).unwrap_or(u16::MAX);
    let mut data = rows.to_le_bytes().to_vec();
    for (number, row) in (0..rows).zip(image.chunks_exact(ROW)) {
        if row.iter().any(|byte| *byte != 0) {
            data.extend(number.to_le_bytes());
            data.extend(row);
        }
    }
    data
}

/// Reads the image as [`crate::image::run`] does.
pub fn run(data: &[u8]) {
    crate::image::run(&expand(data));
}
