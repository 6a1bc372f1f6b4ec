// A caller on grpc-js: `node rolling_caller.js ADDRESS,ADDRESS,…`. It makes unary calls and streams until its stdin ends,
// and prints one line of JSON: how many calls were good, and the failures by text. GRPC_JS is the folder of @grpc/grpc-js.
'use strict';
const grpc = require(process.env.GRPC_JS);

const METHODS = '/inference.GRPCInferenceService/';
const RUNNING = { unary: 4, streams: 2 };
const counted = { good: 0, failures: {} };
let going = true;

// ModelInferRequest {model_name = 1: "m", id = 3, inputs = 5: {name "IN", datatype "UINT8", shape [32]}, raw = 7}
function field(number, bytes) { return Buffer.concat([Buffer.from([number << 3 | 2, bytes.length]), bytes]); }
function request(id) {
  const tensor = Buffer.concat([field(1, Buffer.from('IN')), field(2, Buffer.from('UINT8')), field(3, Buffer.from([32]))]);
  return Buffer.concat([field(1, Buffer.from('m')), field(3, Buffer.from(id)), field(5, tensor), field(7, Buffer.alloc(32))]);
}

const same = (bytes) => bytes;
let number = 0;
function nextId() { return `js-${process.pid}-${number++}`; }
function good(answer, id) {
  if (answer.includes(Buffer.from(id))) counted.good++;
  else failed({ code: 'WRONG', details: `an answer without ${id}` });
}
function failed(error) {
  const text = `${error.code}: ${error.details}`;
  counted.failures[text] = (counted.failures[text] || 0) + 1;
}
const deadline = () => ({ deadline: Date.now() + 60000 });

function unary(client) {
  if (!going) return;
  const id = nextId();
  client.makeUnaryRequest(`${METHODS}ModelInfer`, same, same, request(id), new grpc.Metadata(), deadline(), (error, answer) => {
    if (error) failed(error); else good(answer, id);
    setTimeout(() => unary(client), 15);
  });
}

function stream(client) {
  if (!going) return;
  const call = client.makeBidiStreamRequest(`${METHODS}ModelStreamInfer`, same, same, new grpc.Metadata(), deadline());
  let left = 5;
  let id = nextId();
  call.write(request(id));
  call.on('data', (answer) => {
    good(answer, id);
    if (--left === 0) { call.end(); return; }
    id = nextId();
    setTimeout(() => call.write(request(id)), 15);
  });
  call.on('error', () => {});
  call.on('status', (status) => {
    if (status.code !== 0) failed(status);
    setTimeout(() => stream(client), 15);
  });
}

const target = `ipv4:${process.argv[2]}`;
const options = {
  'grpc.service_config': JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  'grpc.use_local_subchannel_pool': 1,
  'grpc.max_reconnect_backoff_ms': 500,
};
const clients = [];
function client() { clients.push(new grpc.Client(target, grpc.credentials.createInsecure(), options)); return clients.at(-1); }
for (let n = 0; n < RUNNING.unary; n++) unary(client());
for (let n = 0; n < RUNNING.streams; n++) stream(client());
process.stdin.resume();
process.stdin.on('end', () => {
  going = false;
  setTimeout(() => { console.log(JSON.stringify(counted)); process.exit(0); }, 2000);
});
