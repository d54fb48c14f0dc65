// A workload in Go, with the client library that most workloads in Go have. It obeys the lines on its
// standard input, and answers each with one line of JSON:
//
//	x509 SOCKET             every X.509-SVID and bundle; a TLS handshake with itself, and one that must fail
//	bundles SOCKET          the bundles of both kinds
//	jwt SOCKET AUDIENCE ID  a JWT-SVID ("-" for any ID), validated here and by the agent
//	validate SOCKET AUDIENCE TOKEN
//	wit SOCKET              what the calls of the WIT profile answer
//	watch SOCKET            begins to watch, answers at once
//	watched                 what was seen since
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
)

type answer map[string]any

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	output := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		reply, err := obey(strings.Fields(lines.Text()))
		if err != nil {
			reply = answer{"error": status.Code(err).String(), "text": err.Error()}
		}
		if err := output.Encode(reply); err != nil {
			panic(err)
		}
	}
}

func obey(words []string) (answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if words[0] == "watched" {
		return seen.answer(), nil
	}
	address := workloadapi.WithAddr(words[1])
	if words[0] == "watch" {
		return seen.begin(address)
	}
	client, err := workloadapi.New(ctx, address)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	switch words[0] {
	case "x509":
		return x509(ctx, client)
	case "bundles":
		return bundles(ctx, client)
	case "jwt":
		return jwt(ctx, client, words[2], words[3])
	case "validate":
		svid, err := client.ValidateJWTSVID(ctx, words[3], words[2])
		if err != nil {
			return nil, err
		}
		return answer{"id": svid.ID.String()}, nil
	case "wit":
		_, svid := client.FetchWITSVID(ctx, "")
		_, bundle := client.FetchWITBundles(ctx)
		return answer{"svid": status.Code(svid).String(), "bundles": status.Code(bundle).String()}, nil
	}
	return nil, fmt.Errorf("what is %q?", words[0])
}

func x509(ctx context.Context, client *workloadapi.Client) (answer, error) {
	all, err := client.FetchX509Context(ctx)
	if err != nil {
		return nil, err
	}
	ids, hints := []string{}, []string{}
	for _, svid := range all.SVIDs {
		ids = append(ids, svid.ID.String())
		hints = append(hints, svid.Hint)
	}
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(client))
	if err != nil {
		return nil, err
	}
	defer source.Close()
	own := all.DefaultSVID().ID
	if err := handshake(source, own); err != nil {
		return nil, err
	}
	stranger := spiffeid.RequireFromPath(own.TrustDomain(), "/svc/stranger")
	return answer{"ids": ids, "hints": hints, "stranger": handshake(source, stranger) == nil}, nil
}

// handshake connects to itself, and wants the peer to have an ID.
func handshake(source *workloadapi.X509Source, id spiffeid.ID) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer listener.Close()
	served := make(chan error, 1)
	go func() {
		connection, err := listener.Accept()
		if err == nil {
			defer connection.Close()
			server := tls.Server(connection, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(id)))
			if err = server.Handshake(); err == nil {
				_, err = server.Write([]byte("hello"))
			}
		}
		served <- err
	}()
	client, err := tls.Dial("tcp", listener.Addr().String(), tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return err
	}
	defer client.Close()
	if _, err := io.ReadFull(client, make([]byte, 5)); err != nil {
		return err
	}
	return <-served
}

func bundles(ctx context.Context, client *workloadapi.Client) (answer, error) {
	x509, err := client.FetchX509Bundles(ctx)
	if err != nil {
		return nil, err
	}
	keys, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return nil, err
	}
	reply := answer{}
	for _, bundle := range x509.Bundles() {
		jwt, _ := keys.Get(bundle.TrustDomain())
		count := 0
		if jwt != nil {
			count = len(jwt.JWTAuthorities())
		}
		reply[bundle.TrustDomain().Name()] = []int{len(bundle.X509Authorities()), count}
	}
	return reply, nil
}

func jwt(ctx context.Context, client *workloadapi.Client, audience, subject string) (answer, error) {
	params := jwtsvid.Params{Audience: audience}
	if subject != "-" {
		id, err := spiffeid.FromString(subject)
		if err != nil {
			return nil, err
		}
		params.Subject = id
	}
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClient(client))
	if err != nil {
		return nil, err
	}
	defer source.Close()
	svids, err := source.FetchJWTSVIDs(ctx, params)
	if err != nil {
		return nil, err
	}
	ids := []string{}
	for _, svid := range svids {
		token := svid.Marshal()
		here, err := jwtsvid.ParseAndValidate(token, source, []string{audience})
		if err != nil {
			return nil, err
		}
		there, err := client.ValidateJWTSVID(ctx, token, audience)
		if err != nil {
			return nil, err
		}
		if here.ID != there.ID || here.ID != svid.ID {
			return nil, fmt.Errorf("%s, %s and %s", svid.ID, here.ID, there.ID)
		}
		ids = append(ids, svid.ID.String())
	}
	return answer{"ids": ids, "token": svids[0].Marshal()}, nil
}

// watcher records what every kind of watch brings.
type watcher struct {
	sync.Mutex
	serials     []string
	authorities []int
	bundles     []int
	keys        []int
	errors      []string
}

var seen watcher

func (w *watcher) begin(address workloadapi.ClientOption) (answer, error) {
	client, err := workloadapi.New(context.Background(), address)
	if err != nil {
		return nil, err
	}
	go client.WatchX509Context(context.Background(), w)
	go client.WatchX509Bundles(context.Background(), w)
	go client.WatchJWTBundles(context.Background(), w)
	return answer{}, nil
}

func (w *watcher) answer() answer {
	w.Lock()
	defer w.Unlock()
	return answer{"serials": w.serials, "authorities": w.authorities, "bundles": w.bundles, "keys": w.keys, "errors": w.errors}
}

func (w *watcher) OnX509ContextUpdate(update *workloadapi.X509Context) {
	w.Lock()
	defer w.Unlock()
	svid := update.DefaultSVID()
	bundle, err := update.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		w.errors = append(w.errors, err.Error())
		return
	}
	w.serials = append(w.serials, svid.Certificates[0].SerialNumber.String())
	w.authorities = append(w.authorities, len(bundle.X509Authorities()))
}

func (w *watcher) OnX509ContextWatchError(err error) { w.failed("x509", err) }

func (w *watcher) OnX509BundlesUpdate(set *x509bundle.Set) {
	w.Lock()
	defer w.Unlock()
	for _, bundle := range set.Bundles() {
		w.bundles = append(w.bundles, len(bundle.X509Authorities()))
	}
}

func (w *watcher) OnX509BundlesWatchError(err error) { w.failed("bundles", err) }

func (w *watcher) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	w.Lock()
	defer w.Unlock()
	for _, bundle := range set.Bundles() {
		w.keys = append(w.keys, len(bundle.JWTAuthorities()))
	}
}

func (w *watcher) OnJWTBundlesWatchError(err error) { w.failed("jwt", err) }

func (w *watcher) failed(what string, err error) {
	w.Lock()
	defer w.Unlock()
	w.errors = append(w.errors, what+" "+status.Code(err).String())
}
