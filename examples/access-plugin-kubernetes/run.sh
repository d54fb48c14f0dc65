#!/bin/bash
# The identity of an access plugin, in the Secret that its Helm chart mounts.
#
# Needs a Kubernetes cluster: KUBECONFIG says which.
. "$(dirname "$0")/../lib.sh"

say "the plugin's role, and a bot that may take it on"
start_cluster
cluster create -f resources.yaml

say "the agent writes the Secret"
once pagerduty
secret=$(sed -n 's/.*identitySecretName: //p' teleport-pagerduty-values.yaml)
kubectl get secret "$secret" -o jsonpath='{.metadata.name}{"\n"}'

say "what the chart mounts: one key of it"
key=$(sed -n 's/.*identitySecretPath: //p' teleport-pagerduty-values.yaml)
kubectl get secret "$secret" -o "jsonpath={.data.$key}" | base64 -d > identity
grep -c -e "-----BEGIN" -e "-cert-v01@openssh.com" -e "@cert-authority" identity
sed -n '/^-----BEGIN CERTIFICATE/,/^-----END/p' identity | openssl x509 -noout -subject -nameopt RFC2253 | grep -o "CN=[^,]*"

say "a second run replaces it as a whole"
before=$(kubectl get secret "$secret" -o jsonpath='{.metadata.resourceVersion}')
once pagerduty
after=$(kubectl get secret "$secret" -o jsonpath='{.metadata.resourceVersion}')
echo "was version $before, is $after"
[ "$before" != "$after" ]
