//! What the clients that log in the same way share: the token or password of now, and the thread that renews it.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rdkafka::bindings::{
    rd_kafka_error_destroy, rd_kafka_oauthbearer_set_token, rd_kafka_oauthbearer_set_token_failure,
    rd_kafka_sasl_set_credentials,
};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::{RDKafka, RDKafkaRespErr};

use super::token::{Token, TokenError};
use super::{Kind, Method, Text, oidc};
use crate::backoff::Backoff;

/// How often files are read again.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// First and longest wait after a failed request for a token; it doubles each time.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// All credentials of the process: few, and kept until its end, so that no token is fetched twice.
static ALL: Mutex<Vec<Arc<Credentials>>> = Mutex::new(Vec::new());

pub(super) struct Credentials {
    method: Method,
    state: Mutex<State>,
    /// Signaled when a client registers.
    registered: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    clients: BTreeMap<u64, Handle>,
    token: Option<Token>,
    /// Why the last request for a token failed; empty if it did not.
    failure: String,
    /// User name and password, once they differ from those in the settings.
    password: Option<(String, String)>,
}

/// A client that lives as long as its [`Registration`].
struct Handle(*mut RDKafka);

// SAFETY: librdkafka's functions on clients may be called from any thread.
unsafe impl Send for Handle {}

/// The client gets what it needs to log in until this is dropped.
pub(super) struct Registration {
    credentials: Arc<Credentials>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.credentials.state().clients.remove(&self.id);
    }
}

impl Credentials {
    /// The credentials of this method. Starts their thread when they are first asked for.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn of(method: Method) -> KafkaResult<Arc<Self>> {
        let mut all = ALL.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(known) = all.iter().find(|known| known.method == method) {
            return Ok(Arc::clone(known));
        }
        let new = Arc::new(Self { method, state: Mutex::default(), registered: Condvar::new() });
        let served = Arc::clone(&new);
        std::thread::Builder::new()
            .name("kandle-login".to_owned())
            .spawn(move || served.serve())
            .map_err(|e| KafkaError::ClientCreation(format!("thread kandle-login: {e}")))?;
        all.push(Arc::clone(&new));
        Ok(new)
    }

    /// Gives the client what is there already, and from now on all that is new.
    ///
    /// # Safety
    /// The client must live longer than the registration.
    pub unsafe fn register(self: Arc<Self>, client: *mut RDKafka) -> Registration {
        let handle = Handle(client);
        let mut state = self.state();
        match &state.token {
            Some(token) if !token.lifetime().is_zero() => handle.set_token(token),
            _ => handle.set_failure(&state.failure),
        }
        if let Some((username, password)) = &state.password {
            handle.set_password(username, password);
        }
        let id = state.next;
        state.next += 1;
        state.clients.insert(id, handle);
        drop(state);
        self.registered.notify_all();
        Registration { credentials: self, id }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn await_a_client(&self) {
        let nobody = |state: &mut State| state.clients.is_empty();
        drop(self.registered.wait_while(self.state(), nobody).unwrap_or_else(|e| e.into_inner()));
    }

    /// The thread's work: it never ends.
    fn serve(&self) {
        let mut tokens = Tokens::of(&self.method.kind);
        let mut files = Files::new(&self.method.files);
        let mut password_problem = String::new();
        loop {
            // While the process has no client, nothing is fetched.
            self.await_a_client();
            if let Some(tokens) = &mut tokens {
                self.renew(tokens);
            }
            if let Kind::Password { username, password } = &self.method.kind {
                self.read_password(username, password, &mut password_problem);
            }
            files.look();
            let due = tokens.as_ref().map(|tokens| tokens.due.saturating_duration_since(Instant::now()));
            std::thread::park_timeout(due.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL));
        }
    }

    fn renew(&self, tokens: &mut Tokens) {
        if Instant::now() < tokens.due {
            return;
        }
        match tokens.source.fetch() {
            Ok(token) => {
                let lifetime = token.lifetime();
                tokens.backoff.reset();
                tokens.due = Instant::now() + renew_after(lifetime);
                tracing::debug!(lifetime_s = lifetime.as_secs(), "got an access token for the brokers");
                let mut state = self.state();
                state.clients.values().for_each(|client| client.set_token(&token));
                state.token = Some(token);
                state.failure.clear();
            }
            Err(error) => {
                let retry_in = humantime::format_duration(tokens.backoff.delay());
                tracing::warn!(%error, %retry_in, "got no access token for the brokers: trying again");
                tokens.due = Instant::now() + tokens.backoff.take();
                let mut state = self.state();
                state.failure = error.to_string();
                state.clients.values().for_each(|client| client.set_failure(&state.failure));
            }
        }
    }

    /// Reads the user name and the password again and gives them to the clients if they have changed. `problem`: the
    /// last error, which is logged once.
    fn read_password(&self, username: &Text, password: &Text, problem: &mut String) {
        let read = username.now().and_then(|name| Ok((name, password.now()?)));
        let (name, secret) = match read {
            // Nothing is written yet.
            Ok((name, secret)) if name.is_empty() || secret.is_empty() => return,
            Ok(both) => both,
            Err(reason) => {
                if *problem != reason {
                    tracing::warn!(
                        reason,
                        "cannot read the user name or password again: keeping the last one"
                    );
                    *problem = reason;
                }
                return;
            }
        };
        problem.clear();
        let mut state = self.state();
        let (known_name, known_secret) = match &state.password {
            Some((name, secret)) => (name, secret),
            None => (&username.value, &password.value),
        };
        if (known_name, known_secret) != (&name, &secret) {
            tracing::info!("the user name or password has changed: new connections use it");
            state.clients.values().for_each(|client| client.set_password(&name, &secret));
            state.password = Some((name, secret));
        }
    }
}

/// When to renew a token of this lifetime: before the brokers ask for a new one, which librdkafka sends them at nine
/// tenths of the lifetime.
fn renew_after(lifetime: Duration) -> Duration {
    (lifetime * 3 / 4).max(Duration::from_secs(1))
}

/// Where tokens come from, and when the next one is due.
struct Tokens {
    source: TokenSource,
    due: Instant,
    backoff: Backoff,
}

enum TokenSource {
    Oidc(oidc::Provider),
    #[cfg(feature = "msk-iam")]
    MskIam(super::msk_iam::Signer),
}

impl Tokens {
    fn of(kind: &Kind) -> Option<Self> {
        let source = match kind {
            Kind::Unaided | Kind::Password { .. } => return None,
            Kind::Oidc(properties) => TokenSource::Oidc(oidc::Provider::new(properties.clone())),
            #[cfg(feature = "msk-iam")]
            Kind::MskIam { region } => TokenSource::MskIam(super::msk_iam::Signer::new(region)),
        };
        Some(Self { source, due: Instant::now(), backoff: Backoff::new(BACKOFF) })
    }
}

impl TokenSource {
    fn fetch(&mut self) -> Result<Token, TokenError> {
        match self {
            Self::Oidc(provider) => provider.fetch(),
            #[cfg(feature = "msk-iam")]
            Self::MskIam(signer) => signer.sign(),
        }
    }
}

/// Certificates and keys, which librdkafka reads once: if they change, the process must be restarted.
struct Files(Vec<(PathBuf, Option<Vec<u8>>)>);

impl Files {
    fn new(paths: &[PathBuf]) -> Self {
        Self(paths.iter().map(|path| (path.clone(), std::fs::read(path).ok())).collect())
    }

    fn look(&mut self) {
        for (path, known) in &mut self.0 {
            let Ok(now) = std::fs::read(&*path) else { continue };
            if known.as_ref().is_some_and(|known| *known != now) {
                tracing::warn!(
                    path = %path.display(),
                    "a certificate or key file has changed: restart kandle to use it, before the old one expires"
                );
            }
            *known = Some(now);
        }
    }
}

impl Handle {
    fn set_token(&self, token: &Token) {
        let expires = token.expires.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let (value, principal) = (text(&token.value), text(&token.principal));
        let pairs = token.extensions.iter().flat_map(|(key, value)| [text(key), text(value)]);
        let pairs: Vec<CString> = pairs.collect();
        let mut pointers: Vec<*const c_char> = pairs.iter().map(|text| text.as_ptr()).collect();
        let mut reason = [0 as c_char; 512];
        // SAFETY: the client lives as long as its registration, and the credentials' lock keeps that from ending now.
        // librdkafka copies the texts, and ends the reason with NUL.
        let (code, reason) = unsafe {
            let code = rd_kafka_oauthbearer_set_token(
                self.0,
                value.as_ptr(),
                expires.as_millis() as i64,
                principal.as_ptr(),
                pointers.as_mut_ptr(),
                pointers.len(),
                reason.as_mut_ptr(),
                reason.len(),
            );
            (code, CStr::from_ptr(reason.as_ptr()).to_string_lossy().into_owned())
        };
        if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            self.set_failure(&reason);
        }
    }

    /// Lets the client report why it has no token. It keeps the old one, if it has one.
    fn set_failure(&self, reason: &str) {
        let Ok(reason) = CString::new(reason) else { return };
        if !reason.is_empty() {
            // SAFETY: as in `set_token`.
            unsafe { rd_kafka_oauthbearer_set_token_failure(self.0, reason.as_ptr()) };
        }
    }

    fn set_password(&self, username: &str, password: &str) {
        let (Ok(username), Ok(password)) = (CString::new(username), CString::new(password)) else { return };
        // SAFETY: as in `set_token`; an error, if there is one, is destroyed once.
        unsafe {
            let error = rd_kafka_sasl_set_credentials(self.0, username.as_ptr(), password.as_ptr());
            if !error.is_null() {
                rd_kafka_error_destroy(error);
            }
        }
    }
}
