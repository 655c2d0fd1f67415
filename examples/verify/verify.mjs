// Verify access tokens of Personae, one a line: node verify.mjs ISSUER AUDIENCE < tokens.
import { createInterface } from 'node:readline'
import { createRemoteJWKSet, jwtVerify } from 'jose'

/**
 * Make one for the whole process: it keeps the keys.
 * It reads them again after five minutes, and for a new kid half a minute after it last did.
 * The function that it returns takes a token, and returns its claims or throws an error of jose.
 */
function verifier(issuer, audience) {
  const keys = createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`), { cacheMaxAge: 300_000 })
  const options = {
    issuer,
    audience,
    algorithms: ['ES256'], // never what the token says
    typ: 'at+jwt', // no other kind of token is taken for one (RFC 9068, section 4)
    requiredClaims: ['sub', 'exp', 'jti', 'client_id'],
    maxTokenAge: '1h', // only with it does jose look at iat; no access token is good for longer
    clockTolerance: '10s', // by which the clocks may differ
  }
  return async (token) => (await jwtVerify(token, keys, options)).payload
}

const verify = verifier(process.argv[2], process.argv[3])
for await (const token of createInterface({ input: process.stdin })) {
  try {
    console.log('good: user', (await verify(token)).sub)
  } catch (error) {
    console.log('refused:', error.code, error.message)
  }
}
