// node_heap.js SEED MIB SECONDS: objects and buffers under a moving collector, and code that is compiled
// while it runs.
//
// Three quarters of the memory is the JavaScript heap (short- and long-lived objects, moved by the
// collector), one quarter lies in buffers outside of it. Every object says what it must hold.
'use strict';

const [seed, mib, seconds] = process.argv.slice(2).map(Number);

function fail(text) {
  require('fs').writeSync(2, text + '\n');
  process.exit(1);
}

function mix(x) {
  x = (x + 0x9e3779b9) | 0;
  x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
  x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
  return (x ^ (x >>> 15)) >>> 0;
}

let state = seed;
const draw = (limit) => (state = mix(state)) % limit;

// About 900 bytes of heap: strings, doubles, small integers, a nested object.
function make(key, generation) {
  const h = mix(seed ^ mix(key) ^ Math.imul(generation, 0x9e3779b1));
  const doubles = new Array(60);
  for (let i = 0; i < 60; i++) doubles[i] = mix(h + i) / 3;
  return { key, generation, text: `${h}:${key}:${generation}`.repeat(4), doubles, next: { h, list: [h & 255, h >>> 24] } };
}

function check(object, key, generation, when) {
  const h = mix(seed ^ mix(key) ^ Math.imul(generation, 0x9e3779b1));
  let right = object.key === key && object.generation === generation && object.next.h === h &&
    object.text === `${h}:${key}:${generation}`.repeat(4) && object.next.list[0] === (h & 255) && object.next.list[1] === h >>> 24;
  for (let i = 0; right && i < 60; i++) right = object.doubles[i] === mix(h + i) / 3;
  if (!right) fail(`${when}: object ${key} of generation ${generation} is ${JSON.stringify(object)}`);
}

const WORDS = 4096 / 4 * 5; // five pages a buffer

function fill(buffer, key, generation) {
  for (let i = 0; i < WORDS; i++) buffer[i] = mix(seed + key * 65537 + generation * 257 + i);
}

function checkBuffer(buffer, key, generation) {
  for (let i = 0; i < WORDS; i++)
    if (buffer[i] !== mix(seed + key * 65537 + generation * 257 + i)) fail(`buffer ${key} of generation ${generation}: word ${i} is ${buffer[i]}`);
}

// Hot loops with known results. The argument's type changes now and then, which throws the compiled
// code away and compiles it anew.
function sum(values) {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i];
  return total;
}

function hot() {
  const integers = Array.from({ length: 1000 }, (_, i) => i);
  for (let i = 0; i < 300; i++) if (sum(integers) !== 499500) fail('integer sum');
  const halves = integers.map((x) => x + 0.5);
  for (let i = 0; i < 300; i++) if (sum(halves) !== 500000) fail('double sum');
  if (draw(8) === 0 && sum(['a', 'b', 'c']) !== '0abc') fail('string sum');
  const made = new Function('x', `let t = ${draw(1000)}; for (let i = 0; i < 2000; i++) t = Math.imul(t + x, 31) ^ i; return t >>> 0;`);
  const once = made(7);
  for (let i = 0; i < 20; i++) if (made(7) !== once) fail('a compiled function changed its mind');
}

const objectCount = Math.floor(mib * 0.75 * 1024 * 1024 / 900);
const bufferCount = Math.floor(mib * 0.25 * 1024 * 1024 / (WORDS * 4));
const objects = new Array(objectCount), objectGeneration = new Uint32Array(objectCount);
const buffers = new Array(bufferCount), bufferGeneration = new Uint32Array(bufferCount);
for (let key = 0; key < objectCount; key++) objects[key] = make(key, 0);
for (let key = 0; key < bufferCount; key++) {
  buffers[key] = new Uint32Array(WORDS);
  fill(buffers[key], key, 0);
}

const end = Date.now() + seconds * 1000;
let checks = 0, nextBeat = 0;
while (Date.now() < end) {
  for (let i = 0; i < 500 && Date.now() < end; i++) {
    const key = draw(objectCount);
    check(objects[key], key, objectGeneration[key], 'in turn');
    if (draw(3) === 0) objects[key] = make(key, ++objectGeneration[key]);
    checks++;
  }
  for (let i = 0; i < 10; i++) {
    const key = draw(bufferCount);
    checkBuffer(buffers[key], key, bufferGeneration[key]);
    const choice = draw(4);
    if (choice === 0) buffers[key] = new Uint32Array(WORDS); // the old one is garbage
    if (choice < 2) fill(buffers[key], key, ++bufferGeneration[key]);
  }
  hot();
  if (global.gc && draw(32) === 0) global.gc();
  if (Date.now() >= nextBeat) {
    nextBeat = Date.now() + 250;
    require('fs').writeSync(1, `@beat ${checks}\n`);
  }
}
for (let key = 0; key < objectCount; key++) check(objects[key], key, objectGeneration[key], 'end');
for (let key = 0; key < bufferCount; key++) checkBuffer(buffers[key], key, bufferGeneration[key]);
if (checks === 0) fail('nothing was checked');
require('fs').writeSync(1, `# checks=${checks}\n`);
