//! The join service of an 18.0 cluster: a call for what needs no challenge, a stream for each method
//! that does.

use std::time::Duration;

use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::attempt::Attempt;
use super::{Auth, Refusal, blocking, caller, user_agent};
use crate::embedded::caller::Caller;
use crate::join::iam::verify as iam;
use crate::join::token::verify as token;
use crate::pb::proto::join_service_server::JoinService;
use crate::pb::proto::{Certs, RegisterUsingIamMethodRequest, RegisterUsingIamMethodResponse};
use crate::pb::types::RegisterUsingTokenRequest;

/// The longest that a join with a challenge may take.
const STREAM: Duration = Duration::from_mins(1);

impl Auth {
    /// Joins with nothing but the token's name.
    ///
    /// # Errors
    /// The refusal, as it was written into the audit log.
    pub(super) async fn by_token(&self, mut attempt: Attempt) -> Result<Certs, Refusal> {
        let join = blocking(move || {
            let certs = attempt.look_up().and_then(|()| {
                token::check(attempt.method())
                    .map_err(|error| Refusal::denied(error.to_string()))?;
                attempt.issue()
            });
            attempt.finish(certs)
        });
        self.joins.run(join).await
    }

    /// The whole exchange of a challenge and its answer.
    pub(super) async fn iam_exchange(
        &self,
        caller: Caller,
        user_agent: String,
        requests: impl Stream<Item = Result<RegisterUsingIamMethodRequest, Status>>,
        responses: &tokio::sync::mpsc::Sender<Result<RegisterUsingIamMethodResponse, Status>>,
    ) -> Result<(), Status> {
        tokio::pin!(requests);
        let challenge = iam::challenge();
        let gone = |_closed| Status::cancelled("the client went away");
        let first = RegisterUsingIamMethodResponse {
            challenge: challenge.clone(),
            certs: None,
        };
        responses.send(Ok(first)).await.map_err(gone)?;
        let Some(request) = requests.next().await else {
            return Err(Status::cancelled("the client went away"));
        };
        let request = request?;
        let join = request
            .register_using_token_request
            .ok_or_else(|| Refusal::bad_parameter("missing parameter RegisterUsingTokenRequest"))?;
        if request.sts_identity_request.is_empty() {
            return Err(Refusal::bad_parameter("missing parameter StsIdentityRequest").into());
        }
        let attempt = Attempt::new(&self.state, caller, user_agent, join);
        let certs = self
            .by_iam(attempt, &challenge, &request.sts_identity_request)
            .await?;
        let last = RegisterUsingIamMethodResponse {
            challenge: String::new(),
            certs: Some(certs),
        };
        responses.send(Ok(last)).await.map_err(gone)
    }
}

#[tonic::async_trait]
impl JoinService for Auth {
    type RegisterUsingIAMMethodStream =
        ReceiverStream<Result<RegisterUsingIamMethodResponse, Status>>;

    async fn register_using_iam_method(
        &self,
        request: Request<tonic::Streaming<RegisterUsingIamMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingIAMMethodStream>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let (responses, stream) = tokio::sync::mpsc::channel(2);
        let auth = self.clone();
        tokio::spawn(async move {
            let exchange = auth.iam_exchange(caller, agent, request.into_inner(), &responses);
            let ended = tokio::select! {
                ended = tokio::time::timeout(STREAM, Box::pin(exchange)) => ended,
                () = responses.closed() => return,
            };
            let status = match ended {
                Ok(Ok(())) => return,
                Ok(Err(status)) => status,
                Err(_elapsed) => Refusal::limit(
                    "iam join method timed out after 1m0s, terminating the stream on the server",
                )
                .into(),
            };
            // Nobody to tell if the client has gone.
            drop(responses.send(Err(status)).await);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn register_using_token(
        &self,
        request: Request<RegisterUsingTokenRequest>,
    ) -> Result<Response<Certs>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let attempt = Attempt::new(&self.state, caller, agent, request.into_inner());
        let certs = self.by_token(attempt).await?;
        Ok(Response::new(certs))
    }
}
