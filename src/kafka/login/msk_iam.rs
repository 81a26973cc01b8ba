//! Tokens for Amazon MSK with IAM: requests that are signed with the process's AWS credentials and never sent to AWS.
//! Their form is that of <https://github.com/aws/aws-msk-iam-auth>, made by the crate aws-msk-iam-sasl-signer.

use std::time::{Duration, SystemTime};

use aws_config::Region;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_credential_types::provider::SharedCredentialsProvider;
use tokio::runtime::{Builder, Runtime};

use super::token::{Token, TokenError};

/// How long AWS may take to answer a request for credentials.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The region that the brokers' names tell (`b-1.….kafka.eu-central-1.amazonaws.com:9098`), else that of the
/// environment.
pub(super) fn region(brokers: &str) -> Option<String> {
    let of_broker = |broker: &str| {
        let host = broker.trim().rsplit_once(':').map_or(broker, |(host, _)| host);
        let name = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"))?;
        let mut labels = name.rsplit('.');
        let region = labels.next()?;
        labels.next().filter(|service| matches!(*service, "kafka" | "kafka-serverless"))?;
        Some(region.to_owned())
    };
    let set = |name: &&str| std::env::var(name).ok().filter(|region| !region.is_empty());
    let named = brokers.split(',').find_map(of_broker);
    named.or_else(|| ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(set))
}

/// Signs tokens. The chain of credential providers is built once, so that it can cache what it gets.
pub(super) struct Signer {
    region: Region,
    runtime: Option<Runtime>,
    credentials: Option<SharedCredentialsProvider>,
}

impl Signer {
    pub fn new(region: &str) -> Self {
        Self { region: Region::new(region.to_owned()), runtime: None, credentials: None }
    }

    /// Signs a token with the credentials of the environment, the profile, the web identity, or the container's or
    /// machine's role.
    ///
    /// # Errors
    /// There are no credentials, or their provider does not answer.
    pub fn sign(&mut self) -> Result<Token, TokenError> {
        let aws = |e: &dyn std::error::Error| {
            let causes = std::iter::successors(Some(e), |e| e.source()).map(ToString::to_string);
            TokenError::Aws(causes.collect::<Vec<_>>().join(": "))
        };
        let runtime = match self.runtime.take() {
            Some(runtime) => runtime,
            None => Builder::new_current_thread().enable_all().build().map_err(|e| aws(&e))?,
        };
        let (region, known) = (self.region.clone(), self.credentials.take());
        let signed = runtime.block_on(async {
            let credentials = match known {
                Some(known) => known,
                None => {
                    let chain = DefaultCredentialsChain::builder().region(region.clone()).build().await;
                    SharedCredentialsProvider::new(chain)
                }
            };
            let token = aws_msk_iam_sasl_signer::generate_auth_token_from_credentials_provider(
                region,
                credentials.clone(),
            );
            (tokio::time::timeout(TIMEOUT, token).await, credentials)
        });
        self.runtime = Some(runtime);
        let (signed, credentials) = signed;
        self.credentials = Some(credentials);
        let (value, expires_ms) = signed
            .map_err(|_| TokenError::Aws(format!("no answer for {} s", TIMEOUT.as_secs())))?
            .map_err(|e| aws(&e))?;
        let expires = SystemTime::UNIX_EPOCH + Duration::from_millis(expires_ms.unsigned_abs());
        // The broker reads the principal from the signature.
        Ok(Token { value, principal: "kandle".to_owned(), expires, extensions: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aws_credential_types::Credentials;
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::hex::hex;

    #[test]
    fn the_region_is_in_the_brokers_names() {
        let msk = "b-1.demo.abc123.c2.kafka.eu-central-1.amazonaws.com:9098,b-2.demo:9098";
        assert_eq!(region(msk).as_deref(), Some("eu-central-1"));
        let serverless = "boot-x.c1.kafka-serverless.us-east-1.amazonaws.com:9098";
        assert_eq!(region(serverless).as_deref(), Some("us-east-1"));
        let china = "b-1.demo.abc.c2.kafka.cn-north-1.amazonaws.com.cn:9098";
        assert_eq!(region(china).as_deref(), Some("cn-north-1"));
    }

    /// HMAC (RFC 2104) with SHA-256.
    fn hmac(key: &[u8], text: &str) -> Vec<u8> {
        let mut padded = [0u8; 64];
        padded[..key.len()].copy_from_slice(key);
        let pad = |byte: u8| padded.map(|b| b ^ byte);
        let inner = Sha256::new().chain_update(pad(0x36)).chain_update(text).finalize();
        Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().to_vec()
    }

    /// The form that AWS publishes (aws-msk-iam-auth, "Details"): a presigned GET of `Action=kafka-cluster:Connect`,
    /// valid for 15 minutes, signed by Signature Version 4, with an unsigned User-Agent, base64url without padding.
    #[test]
    fn a_token_has_the_form_and_the_signature_that_aws_publishes() {
        let credentials = Credentials::from_keys("AKIDEXAMPLE", "secret/key+1", Some("session/token".into()));
        let mut signer = Signer::new("eu-central-1");
        signer.credentials = Some(SharedCredentialsProvider::new(credentials));
        let token = signer.sign().unwrap();
        assert!((880..=900).contains(&token.lifetime().as_secs()), "{:?}", token.lifetime());

        let url = String::from_utf8(URL_SAFE_NO_PAD.decode(&token.value).unwrap()).unwrap();
        let query = url.strip_prefix("https://kafka.eu-central-1.amazonaws.com/?").expect("the endpoint");
        let pairs: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let names: Vec<&str> = pairs.keys().copied().collect();
        let expected = [
            "Action",
            "User-Agent",
            "X-Amz-Algorithm",
            "X-Amz-Credential",
            "X-Amz-Date",
            "X-Amz-Expires",
            "X-Amz-Security-Token",
            "X-Amz-Signature",
            "X-Amz-SignedHeaders",
        ];
        assert_eq!(names, expected);
        assert_eq!(pairs["Action"], "kafka-cluster%3AConnect");
        assert_eq!(pairs["X-Amz-Algorithm"], "AWS4-HMAC-SHA256");
        assert_eq!((pairs["X-Amz-Expires"], pairs["X-Amz-SignedHeaders"]), ("900", "host"));
        let (date, day) = (pairs["X-Amz-Date"], &pairs["X-Amz-Date"][..8]);
        assert_eq!(
            pairs["X-Amz-Credential"],
            format!("AKIDEXAMPLE%2F{day}%2Feu-central-1%2Fkafka-cluster%2Faws4_request")
        );

        // Signature Version 4, computed once more from its definition.
        let signed = pairs.iter().filter(|(name, _)| !["User-Agent", "X-Amz-Signature"].contains(name));
        let signed: Vec<String> = signed.map(|(name, value)| format!("{name}={value}")).collect();
        let request = format!(
            "GET\n/\n{}\nhost:kafka.eu-central-1.amazonaws.com\n\nhost\n{}",
            signed.join("&"),
            hex(&Sha256::digest(b""))
        );
        let scope = format!("{day}/eu-central-1/kafka-cluster/aws4_request");
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(request)));
        let key = [day, "eu-central-1", "kafka-cluster", "aws4_request"]
            .iter()
            .fold(b"AWS4secret/key+1".to_vec(), |key, part| hmac(&key, part));
        assert_eq!(pairs["X-Amz-Signature"], hex(&hmac(&key, &text)));
    }
}
