// The form of every message on the socket, both ways: the header's length (4 bytes, big-endian), the header (JSON in
// UTF-8), and then the bytes of a picture or nothing. docs/serving.md lists the headers.

const LENGTH_BYTES = 4;

/** A header object, and a picture's bytes if there are any, as one message. */
export function encodeFrame(header, body = new Uint8Array()) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const frame = new Uint8Array(LENGTH_BYTES + text.length + body.length);
  new DataView(frame.buffer).setUint32(0, text.length);
  frame.set(text, LENGTH_BYTES);
  frame.set(body, LENGTH_BYTES + text.length);
  return frame;
}

/** The header object and the bytes behind it, of a message's ArrayBuffer. */
export function decodeFrame(buffer) {
  const end = LENGTH_BYTES + new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, LENGTH_BYTES, end - LENGTH_BYTES)));
  return { header, body: new Uint8Array(buffer, end) };
}
