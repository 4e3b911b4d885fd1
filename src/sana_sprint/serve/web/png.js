// Text chunks of PNG files, which hold a picture's settings.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const IHDR_END = SIGNATURE.length + 25; // IHDR is always first: 12 bytes around 13

/** Whether these bytes begin as a PNG file does. */
export function isPng(bytes) {
  return SIGNATURE.every((byte, i) => bytes[i] === byte);
}

/** The uncompressed texts of a PNG file's bytes, by keyword; nothing for any other file. */
export function readTexts(bytes) {
  const texts = {};
  if (!isPng(bytes)) return texts;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = SIGNATURE.length; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = latin1(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (type === "tEXt") readPlain(data, texts);
    if (type === "iTXt") readInternational(data, texts);
    at += 12 + length;
  }
  return texts;
}

/** The PNG file with texts {keyword: text} put in, right after its header. */
export function writeTexts(bytes, texts) {
  const chunks = Object.entries(texts).map(([keyword, text]) => internationalChunk(keyword, text));
  return new Blob([bytes.subarray(0, IHDR_END), ...chunks, bytes.subarray(IHDR_END)], { type: "image/png" });
}

function readPlain(data, texts) {
  const end = data.indexOf(0);
  if (end > 0) texts[latin1(data.subarray(0, end))] = latin1(data.subarray(end + 1));
}

/** keyword 0, compressed?, method, language 0, translated keyword 0, text */
function readInternational(data, texts) {
  const end = data.indexOf(0);
  if (end < 1 || data[end + 1] !== 0) return;
  const language = data.indexOf(0, end + 3);
  const translated = data.indexOf(0, language + 1);
  if (language < 0 || translated < 0) return;
  texts[latin1(data.subarray(0, end))] = new TextDecoder().decode(data.subarray(translated + 1));
}

function internationalChunk(keyword, text) {
  const data = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(data.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, data.length - 4); // the type is not counted
  chunk.set(data, 4);
  view.setUint32(data.length + 4, crc32(data));
  return chunk;
}

function latin1(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}

const CRC_POLYNOMIAL = 0xedb88320;

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? CRC_POLYNOMIAL : 0);
  }
  return ~crc >>> 0;
}
