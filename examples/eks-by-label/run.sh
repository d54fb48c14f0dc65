#!/bin/bash
# EKS clusters with a tag are registered by themselves, and get into a kubeconfig by that label.
#
# Needs credentials of AWS, as its own programs find them, with eks:ListClusters and
# eks:DescribeCluster.
. "$(dirname "$0")/../lib.sh"

say "the clusters that AWS has with env=prod"
start_cluster --config teleport.yaml
cluster create -f resources.yaml
found() { [ -n "$(cluster get kube_cluster --format json | tr -d '[]\n ')" ]; }
until_ok found
cluster get kube_cluster

say "a kubeconfig with all of them"
once deployer
kubectl --kubeconfig kube/kubeconfig.yaml config get-contexts -o name

say "what kubectl sends: a certificate from the same directory"
"$tbot" kube credentials --destination-dir kube | head -c 150
echo …
