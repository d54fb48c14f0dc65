#!/bin/bash
# An SVID becomes credentials of an AWS role, in the file that AWS's programs read.
#
# Needs a trust anchor, a profile and a role in AWS; the ARNs are in tbot.yaml.
#
# AWS_SETUP     a command that puts the file it is given into the trust anchor
#               [default: it holds the cluster's authority already]
# AWS_PROGRAM   a program of AWS's  [default: aws sts get-caller-identity]
. "$(dirname "$0")/../lib.sh"

say "who the machine is"
start_cluster
cluster create -f resources.yaml

say "what the trust anchor has to hold: the cluster's authority"
once backup anchor.yaml
openssl x509 -noout -subject -in svid/svid_bundle.pem
${AWS_SETUP:-true} "$work/svid/svid_bundle.pem"

say "credentials"
once backup
sed 's/\(key\|token\) *=.*/\1 = …/' aws/aws_credentials

say "a program of AWS's"
export AWS_SHARED_CREDENTIALS_FILE=$work/aws/aws_credentials AWS_REGION=us-east-1
${AWS_PROGRAM:-aws sts get-caller-identity}
