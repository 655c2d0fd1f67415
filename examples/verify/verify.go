// Verify access tokens of Personae, one a line: go run verify.go ISSUER AUDIENCE < tokens.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/lestrrat-go/httprc/v3"
	"github.com/lestrrat-go/jwx/v3/jwk"
	"github.com/lestrrat-go/jwx/v3/jws"
	"github.com/lestrrat-go/jwx/v3/jwt"
)

// publicKeys is called once in a process: the set is read every five minutes, and forgets the keys that are gone.
func publicKeys(ctx context.Context, issuer string) (jwk.Set, error) {
	url := issuer + "/.well-known/jwks.json"
	cache, err := jwk.NewCache(ctx, httprc.NewClient())
	if err != nil {
		return nil, err
	}
	often := httprc.WithConstantInterval(5 * time.Minute) // without it, a quarter of an hour and more
	if err := cache.Register(ctx, url, jwk.WithHttprcResourceOption(often)); err != nil {
		return nil, err
	}
	return cache.CachedSet(url)
}

// verify returns the claims of a good token. The algorithm is that of the key, ES256: never what the token says.
func verify(token []byte, keys jwk.Set, issuer, audience string) (jwt.Token, error) {
	message, err := jws.Parse(token)
	if err != nil {
		return nil, err
	}
	if kind, _ := message.Signatures()[0].ProtectedHeaders().Type(); kind != "at+jwt" { // RFC 9068, section 4
		return nil, errors.New("not an access token")
	}
	return jwt.Parse(token, jwt.WithKeySet(keys), jwt.WithIssuer(issuer), jwt.WithAudience(audience),
		jwt.WithRequiredClaim("exp"), jwt.WithRequiredClaim("sub"), jwt.WithAcceptableSkew(10*time.Second))
}

func main() {
	keys, err := publicKeys(context.Background(), os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if claims, err := verify(lines.Bytes(), keys, os.Args[1], os.Args[2]); err != nil {
			fmt.Printf("refused: %q\n", err.Error()) // it has several lines
		} else {
			user, _ := claims.Subject()
			fmt.Println("good: user", user)
		}
	}
}
