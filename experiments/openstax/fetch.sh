#!/usr/bin/env bash
# The 23 OpenStax books of the study corpus, each at its last commit under CC BY 4.0: 3.9 GB of clones.
#   experiments/openstax/fetch.sh FOLDER && moma prepare data=openstax folder=FOLDER
set -euo pipefail
folder=${1:?need the folder to clone into}
mkdir -p "$folder"
while read -r book commit; do
  target=$folder/osbooks-$book
  [ -d "$target/.git" ] || git clone --quiet --no-checkout "https://github.com/openstax/osbooks-$book" "$target"
  git -C "$target" checkout --quiet --detach "$commit"
  echo "$book at $commit"
done <<'BOOKS'
american-government 5c90dd7907dbf25f42266417e63ca3bb0012f031
anatomy-physiology b0058a743bdd2cc08196abaaa7d5469970c0d80c
astronomy 63157f370b09c06a4cc12832384aaaf4de1ced3b
business-law 9d510e2126b7327a48d1e286f658dd0e83d47373
chemistry-bundle 32c719622fbb7a0ca729cd645c1df4cf4e7d5b3a
college-physics-bundle f98d7a792138a6133fe7267d17e70aa04e9ccbed
college-success-bundle 4c04b87eb2753872c2d442fe9736859ddb27bb72
entrepreneurship c1fa2c872ba07dc864c3aeb5a510b08b4f657288
introduction-business 78c9e7ad4e581d4ff98e78ea30214840e1fa7e1e
introduction-intellectual-property be76c2d982080df077b6f7f7f784d0bbbc37ee8b
introduction-philosophy d7bd4f0f520529b3ad83272448a9c2be25c9040a
introduction-political-science 4391e659b98eec43b71e8b3f08241215fb4dd4c4
introduction-sociology d35d5f3bdac40f93607d600134865d4f13ce1f9b
life-liberty-and-pursuit-happiness acb6fbe2744dd112187b6aff5946cfe969410fca
microbiology ecf34dad129d686703780e87ab5aa2e59c577a6a
physics ff78c7a8150fdda5ed1f786ac59ac25cdd532ef0
principles-economics-bundle cd31beb103fffbc09cc81ebfe117d8c40cc12d1a
principles-finance 3b7fc65c527ef51dbee24689691f19947fb72fb2
principles-marketing 40369d8ce3adb160cf8d2cc6528cd00be6a472eb
university-physics-bundle db44eb99e9aa1d918fd8cf182f82ccdece9c7b11
us-history 046331cfcea0ac1b1a8fd461b3e6aae638845af3
world-history 3e17beda9130380d24be881e6d1942dfcc1be845
writing-guide a6c95528390e3a2936f5bf87c49ac1a4995a0a6e
BOOKS
