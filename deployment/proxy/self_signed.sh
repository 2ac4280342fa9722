#!/bin/sh
# Makes a certificate authority of our own and a certificate for COTUNE_HOSTNAMES, for trying out; nothing if there is a
# certificate that is good for another 30 days. Devices trust it with SSL_CERT_FILE=ca.pem.
set -eu
cd /certificates
# What agents here are shown: the authority, never a key. A certificate of a public authority needs none of ours.
show_authority() {
    if [ -s ca.pem ]; then cat ca.pem; else cat /etc/ssl/certs/ca-certificates.crt; fi >/authority/ca.pem
}
if [ -s server.pem ] && openssl x509 -in server.pem -noout -checkend 2592000 >/dev/null; then
    echo "the certificate in place stays"
    show_authority
    exit 0
fi
if [ -s server.pem ] && [ ! -s ca.key ]; then
    echo "the certificate in place ends within 30 days; it is not ours to replace" >&2
    show_authority
    exit 0
fi
umask 077
names=$(echo "$COTUNE_HOSTNAMES" | tr ',' '\n' | awk '/^[0-9.]+$/ || /:/ {print "IP:" $0; next} NF {print "DNS:" $0}' | paste -sd, -)
if [ ! -s ca.key ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Cotune, self-signed" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.pem 2>/dev/null
fi
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=Cotune" \
    -keyout server.key -out /tmp/request.pem 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" >/tmp/extensions
openssl x509 -req -in /tmp/request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -extfile /tmp/extensions \
    -out server.new 2>/dev/null
chmod 644 ca.pem server.new
mv server.new server.pem
show_authority
echo "made a certificate for $names"
