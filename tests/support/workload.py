"""A workload that nobody here wrote the client library of: prints the SPIFFE ID it is given."""
from spiffe import X509Source

with X509Source() as source:
    print(source.svid.spiffe_id)
