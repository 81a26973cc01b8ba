// An identity provider for tests: oidc-provider with one client that may use the client credentials grant.
//
//   node server.mjs HTTP_PORT HTTPS_PORT KEY CERTIFICATE CLIENT_SECRET LIFETIME_SECONDS
//
// Prints "ready" when it listens, and ends when standard input closes. Besides the provider's own pages:
//   GET  /test/tokens   how many tokens it has issued
//   POST /test/pause    requests for tokens are refused with 503 from now on
//   POST /test/resume   they are answered again
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createServer as createSecureServer } from 'node:https';
import { exportJWK, generateKeyPair } from 'jose';
import { Provider } from 'oidc-provider';

const [httpPort, httpsPort, key, cert, secret, lifetime] = process.argv.slice(2);
const ttl = Number(lifetime);
const { privateKey } = await generateKeyPair('RS256', { extractable: true });
const provider = new Provider(`https://localhost:${httpsPort}`, {
  clients: [
    {
      client_id: 'kandle',
      client_secret: secret,
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
    },
  ],
  jwks: { keys: [{ ...(await exportJWK(privateKey)), use: 'sig', alg: 'RS256', kid: 'test' }] },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => 'urn:kafka',
      useGrantedResource: () => true,
      getResourceServerInfo: () => ({
        audience: 'kafka',
        scope: 'kafka',
        accessTokenTTL: ttl,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
  ttl: { ClientCredentials: ttl },
});

let tokens = 0;
let paused = false;
provider.on('client_credentials.issued', () => {
  tokens += 1;
});
const pages = provider.callback();
const serve = (request, response) => {
  if (request.url === '/test/tokens') {
    response.end(String(tokens));
  } else if (request.url === '/test/pause' || request.url === '/test/resume') {
    paused = request.url === '/test/pause';
    response.end();
  } else if (paused && request.url === '/token') {
    response.writeHead(503);
    response.end();
  } else {
    pages(request, response);
  }
};
const listening = (server, port) => new Promise((resolve) => server.listen(port, '127.0.0.1', resolve));
await listening(createServer(serve), httpPort);
await listening(createSecureServer({ key: readFileSync(key), cert: readFileSync(cert) }, serve), httpsPort);
console.log('ready');
process.stdin.on('end', () => process.exit(0)).resume();
