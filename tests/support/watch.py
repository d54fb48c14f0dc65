"""Follows the Workload API until it has pushed COUNT different SVIDs; prints the serial number, the
SPIFFE ID and the trust domains of the bundles of each.

usage: SPIFFE_ENDPOINT_SOCKET=unix:///path watch.py COUNT
"""
import queue
import sys

from spiffe import WorkloadApiClient

updates = queue.Queue()
with WorkloadApiClient() as client:
    bundles = client.fetch_x509_bundles()
    print("bundles", *sorted(str(bundle.trust_domain) for bundle in bundles.bundles), flush=True)
    handler = client.stream_x509_contexts(updates.put, updates.put, retry_connect=False)
    seen = set()
    while len(seen) < int(sys.argv[1]):
        update = updates.get(timeout=60)
        if isinstance(update, Exception):
            raise update
        svid = update.default_svid
        if svid.leaf.serial_number not in seen:
            seen.add(svid.leaf.serial_number)
            domain = svid.spiffe_id.trust_domain
            authorities = update.x509_bundle_set.get_bundle_for_trust_domain(domain).x509_authorities
            print("svid", svid.leaf.serial_number, svid.spiffe_id, len(authorities), flush=True)
    handler.cancel()
